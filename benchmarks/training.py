"""Runs of the real commands that benchmarks compare."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def typed(options: Mapping[str, Any]) -> list[str]:
    """``--OPTION VALUE ...`` as a user types them."""
    values = {key: str(value) if isinstance(value, str | Path) else json.dumps(value) for key, value in options.items()}
    return [word for key, value in values.items() for word in (f"--{key}", value)]


def trained(command: str, output: Path, **options: Any) -> Path:
    """The ``final`` of ``kdlib COMMAND --OPTION VALUE ... --output_dir OUTPUT`` on CPU; a finished run is left alone."""
    if (output / "final").is_dir():
        return output / "final"
    call = [sys.executable, "-m", "kdlib", command, *typed(options), "--output_dir", str(output), "--use_cpu", "true"]
    done = subprocess.run(call, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(call)}\n{done.stderr[-3000:]}")
    return output / "final"
