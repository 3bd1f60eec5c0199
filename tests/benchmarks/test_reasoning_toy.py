"""The script that measures the small reasoning recipe runs, from nothing to its page."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "reasoning_toy.py"


@pytest.mark.slow
def test_reasoning_toy_tabulates_every_stage(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    call = [sys.executable, str(SCRIPT), "--quick", "--runs", str(tmp_path / "runs"), "--output", str(page)]
    done = subprocess.run(call, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    written = page.read_text()
    assert "| then on the teacher's verified answers | 0 |" in written and "| the teacher | 0 |" in written
    assert "`on_policy` gains" in written and "over `sft`" in written and "torch " in written
