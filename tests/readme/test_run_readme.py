"""The README runner finds every command, says what it skips, and fails when a command does."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.readme.run_readme import steps, with_wheel

ROOT = Path(__file__).parents[2]
EXAMPLE = """
Text with `code`.

```bash
# a comment
echo one \\
    two   # kept
echo three
```

<!-- not run in CI: needs a GPU -->
```bash
train
```

<!-- in the checkout -->

```bash
make demo
```

```yaml
model: a
```

```python
x = 1
print(x)
```
"""


def test_steps_in_order() -> None:
    found = steps(EXAMPLE)
    assert [(s.line, s.language, s.text) for s in found] == [
        (6, "bash", "echo one \\\n    two   # kept"),
        (8, "bash", "echo three"),
        (13, "bash", "train"),
        (19, "bash", "make demo"),
        (27, "python", "x = 1\nprint(x)\n"),
    ]
    assert [s.skipped for s in found] == [None, None, "needs a GPU", None, None]
    assert [s.in_checkout for s in found] == [False, False, False, True, False]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("```console\nls\n```\n", "line 1: write ```bash"),
        ("```bash\ncat > a <<EOF\nx\nEOF\n```\n", "here-documents"),
        ("```bash\nls \\\n```\n", "ends in a backslash"),
    ],
)
def test_what_would_slip_through_is_an_error(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        steps(text)


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        ('pip install "kdlib[eval]"', 'pip install "kdlib[eval] @ file:///d/w.whl" -c "/d/c.txt"'),
        ("pip install kdlib", 'pip install "kdlib @ file:///d/w.whl" -c "/d/c.txt"'),
        (
            'pip install "kdlib[eval] @ git+https://x/y"',
            'pip install "kdlib[eval] @ file:///d/w.whl" -c "/d/c.txt"',
        ),
        ("kdlib demo", "kdlib demo"),
        ("pip install other", "pip install other"),
    ],
)
def test_the_wheel_stands_in_for_the_release(command: str, expected: str) -> None:
    assert with_wheel(command, wheel=Path("/d/w.whl"), constraints=Path("/d/c.txt")) == expected


def run_script(readme: str, directory: Path) -> subprocess.CompletedProcess[str]:
    (directory / "README.md").write_text(readme)
    options = {"wheel": "w.whl", "constraints": "c.txt", "checkout": directory, "directory": directory}
    argv = [sys.executable, str(ROOT / "tests/readme/run_readme.py"), str(directory / "README.md")]
    argv += [str(part) for name, value in options.items() for part in (f"--{name}", value)]
    return subprocess.run(argv, capture_output=True, text=True, check=False)


def test_commands_share_a_directory_and_are_counted(tmp_path: Path) -> None:
    readme = """```bash
echo 41 > n
```

<!-- not run in CI: a reason -->
```bash
false
```

```python
assert open("n").read() == "41\\n"
```
"""
    done = run_script(readme, tmp_path)
    assert done.returncode == 0, done.stdout
    assert done.stdout.rstrip().endswith("\n2 passed, 0 failed, 1 skipped")
    assert "not run: a reason" in done.stdout


def test_stops_at_the_first_failure(tmp_path: Path) -> None:
    done = run_script("```bash\ntrue\nexit 3\ntouch reached\n```\n", tmp_path)
    assert done.returncode == 1
    assert "exit code 3" in done.stdout
    assert done.stdout.rstrip().endswith("1 passed, 1 failed, 0 skipped")
    assert not (tmp_path / "reached").exists()


def test_nothing_to_run_is_a_failure(tmp_path: Path) -> None:
    assert run_script("Only text.\n", tmp_path).returncode == 1


def test_our_readme_parses_and_starts_with_the_two_ways_in() -> None:
    commands = [step.text for step in steps((ROOT / "README.md").read_text()) if step.language == "bash"]
    assert commands[0] == "make demo"
    assert "make test" in commands
    assert any(command.startswith("pip install") for command in commands)
    assert any(command.startswith("kdlib demo") for command in commands)
