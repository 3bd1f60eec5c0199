"""What people see of rollouts: some of them on disk, and a warning when they stop ending by themselves."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from kdlib.data.rollout_rows import prompt_ids
from kdlib.trainers.rollouts import Row

SHOWN = 2  # completions of a logged step

logger = logging.getLogger("kdlib.rollouts")


class RolloutLog:
    """Appends to samples/rollouts.jsonl of ``output_dir``; ``limit`` is the most tokens of a completion."""

    def __init__(self, output_dir: str | Path, tokenizer: PreTrainedTokenizerBase, *, limit: int) -> None:
        self.path, self.tokenizer, self.limit = Path(output_dir) / "samples" / "rollouts.jsonl", tokenizer, limit
        self._last: list[Row] = []
        self._length, self._cut = 0.0, False

    def note(self, made: Sequence[Row], given: Sequence[Row]) -> None:
        """Keeps some of the rows that got a completion."""
        self._last = [row for row, before in zip(made, given, strict=True) if row is not before][:SHOWN]

    def logged(self, logs: dict[str, float], *, step: int) -> None:
        """Writes what was noted last; warns when most completions were cut, or when they have doubled in length."""
        length, clipped = logs.get("completions/mean_length"), logs.get("completions/clipped_ratio", 0.0)
        if length is None:
            return
        self._write(step)
        self._length = self._length or length
        before, self._cut = self._cut, clipped > 0.5
        if self._cut and not before:  # said once, until it was better in between
            logger.warning(
                "step %d: %.0f%% of the rollouts were cut at max_completion_length %d: raise it, or check that the student "
                "ends its turns",
                step,
                100 * clipped,
                self.limit,
            )
        if length > 2 * self._length:
            logger.warning(
                "step %d: rollouts have grown from %.0f to %.0f tokens: see samples/rollouts.jsonl, and how turns end",
                step,
                self._length,
                length,
            )
            self._length = length

    def _write(self, step: int) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            for row in self._last:
                start = len(prompt_ids(row))
                texts = {"prompt": row["input_ids"][:start], "completion": row["input_ids"][start:]}
                decoded = {name: self.tokenizer.decode(ids) for name, ids in texts.items()}
                line = {"step": step, "tokens": len(texts["completion"]), **decoded}
                file.write(json.dumps(line, ensure_ascii=False) + "\n")
