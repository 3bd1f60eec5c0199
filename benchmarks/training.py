"""Runs of the real commands that benchmarks compare."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any


def trained(command: str, output: Path, **options: Any) -> Path:
    """The ``final`` of ``kdlib COMMAND --OPTION VALUE ... --output_dir OUTPUT`` on CPU; a finished run is left alone."""
    if (output / "final").is_dir():
        return output / "final"
    typed = {key: str(value) if isinstance(value, str | Path) else json.dumps(value) for key, value in options.items()}
    words = [word for key, value in typed.items() for word in (f"--{key}", value)]
    call = [sys.executable, "-m", "kdlib", command, *words, "--output_dir", str(output), "--use_cpu", "true"]
    done = subprocess.run(call, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(call)}\n{done.stderr[-3000:]}")
    return output / "final"
