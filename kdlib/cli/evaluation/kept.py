"""What an evaluation has finished, one JSON file for each part, so that the same command does not score it again."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kdlib.data.shards import setting_changes
from kdlib.files import write_whole


@dataclass(frozen=True, kw_only=True)
class Kept:
    """The finished parts of one model's evaluation in ``directory``; None keeps nothing, ``overwrite`` finds nothing."""

    directory: Path | None
    overwrite: bool

    def get(self, part: str, settings: Mapping[str, Any], *, redo: bool = False) -> dict[str, Any] | None:
        """The results of a part; None when there are none.

        Those of other settings are ValueError naming what differs, or with ``redo`` None: they are cheap to make again.
        """
        path = self._path(part)
        if path is None or self.overwrite or not path.is_file():
            return None
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        changed = setting_changes(content["settings"], _plain(settings))
        if changed and not redo:
            raise ValueError(
                f"{path} holds scores made with other options ({'; '.join(changed)}): type them as they were to continue, "
                "choose another output_path, or add --overwrite true"
            )
        return None if changed else content["results"]

    def put(self, part: str, settings: Mapping[str, Any], results: Mapping[str, Any]) -> dict[str, Any]:
        """Keeps the results of a part, and returns them as ``get`` will."""
        content: dict[str, Any] = _plain({"settings": settings, "results": results})
        path = self._path(part)
        if path is not None:
            write_whole(path, json.dumps(content, ensure_ascii=False) + "\n")
        return content["results"]

    def _path(self, part: str) -> Path | None:
        return None if self.directory is None else self.directory / f"{re.sub(r'[^A-Za-z0-9_.+-]+', '_', part)}.json"


def _plain(content: Any) -> Any:
    """As it comes back from JSON."""
    return json.loads(json.dumps(content, ensure_ascii=False, default=str))
