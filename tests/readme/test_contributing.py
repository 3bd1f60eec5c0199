"""The example objective of CONTRIBUTING.md passes the example test of CONTRIBUTING.md."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.readme.run_readme import steps

ROOT = Path(__file__).parents[2]


def test_the_example_works(tmp_path: Path) -> None:
    objective, test = (s.text for s in steps((ROOT / "CONTRIBUTING.md").read_text()) if s.language == "python")
    (tmp_path / "hellinger.py").write_text(objective)
    (tmp_path / "test_hellinger.py").write_text(test)
    argv = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "--rootdir",
        str(tmp_path),
        "test_hellinger.py",
    ]
    done = subprocess.run(argv, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "4 passed" in done.stdout
