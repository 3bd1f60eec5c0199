"""Run the commands of a README one after another, as its reader would; needs only the standard library.

Every ```bash block runs, command by command, and every ```python block as a file, in one directory. An HTML
comment before a block makes an exception: ``<!-- not run in CI: reason -->`` or ``<!-- in the checkout -->``.
`pip install kdlib` installs the given wheel, at the tested versions, instead of a release.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

FENCE = re.compile(r"^```(\w*)\s*$")
SKIPPED = re.compile(r"^<!-- not run in CI: (.+) -->$")
IN_CHECKOUT = "<!-- in the checkout -->"
PACKAGE = re.compile(r"""(["']?)kdlib(\[[\w,]+\])?( @ git\+[^"'\s]+)?\1(?=\s|$)""")
UNTESTED = {"sh", "shell", "console", "zsh"}  # other names for bash would slip past the run


@dataclass(frozen=True, kw_only=True)
class Step:
    """One command or one Python block: its line in the file, and why it is not run, if it is not."""

    line: int
    language: str
    text: str
    skipped: str | None = None
    in_checkout: bool = False


def steps(markdown: str) -> list[Step]:
    """The runnable steps of a document in order. Raises ValueError for what would silently not be run."""
    found: list[Step] = []
    lines = markdown.splitlines()
    number, comment = 0, ""
    while number < len(lines):
        opening = FENCE.match(lines[number])
        if opening is None:
            comment = lines[number].strip() or comment
            number += 1
            continue
        end = number + 1
        while end < len(lines) and lines[end].rstrip() != "```":
            end += 1
        found += _block(opening[1], lines[number + 1 : end], first=number + 2, comment=comment)
        number, comment = end + 1, ""
    return found


def _block(language: str, body: list[str], *, first: int, comment: str) -> list[Step]:
    if language in UNTESTED:
        raise ValueError(f"line {first - 1}: write ```bash, so that the commands are run, not ```{language}")
    reason = SKIPPED.match(comment)
    skipped, in_checkout = (reason[1] if reason else None), comment == IN_CHECKOUT
    texts = {"python": _whole, "bash": _commands}.get(language)
    if texts is None:
        return []
    return [
        Step(line=first + offset, language=language, text=text, skipped=skipped, in_checkout=in_checkout)
        for offset, text in texts(body)
    ]


def _whole(body: list[str]) -> list[tuple[int, str]]:
    return [(0, "\n".join(body) + "\n")]


def _commands(body: list[str]) -> list[tuple[int, str]]:
    """(offset of the first line, command) for each command; a backslash at a line's end joins the next."""
    found: list[tuple[int, str]] = []
    begun: list[str] = []
    for offset, line in enumerate(body):
        if "<<" in line:
            raise ValueError(f"{line!r}: here-documents are not understood; ship the file or use a python block")
        if not begun and (not line.strip() or line.lstrip().startswith("#")):
            continue
        begun.append(line)
        if not line.endswith("\\"):
            found.append((offset + 1 - len(begun), "\n".join(begun)))
            begun = []
    if begun:
        raise ValueError(f"{begun[-1]!r}: the block ends in a backslash")
    return found


def with_wheel(command: str, *, wheel: Path, constraints: Path) -> str:
    """`pip install kdlib` made to install the wheel with the tested versions; any other command as it is."""
    if not command.lstrip().startswith("pip install"):
        return command
    return PACKAGE.sub(rf'"kdlib\2 @ {wheel.as_uri()}" -c "{constraints}"', command)


def run(step: Step, command: str, *, directory: Path, timeout: float) -> int:
    """The exit code of one step; its output goes where ours does."""
    if step.language == "python":
        script = directory / f"readme_line_{step.line}.py"
        script.write_text(command)
        argv = ["python", str(script)]
    else:
        argv = ["bash", "-c", command]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    try:
        return subprocess.run(
            argv, cwd=directory, env=environment, timeout=timeout, stdin=subprocess.DEVNULL, check=False
        ).returncode
    except subprocess.TimeoutExpired:
        print(f"stopped after {timeout:.0f} s")
        return 124


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("readme", type=Path)
    parser.add_argument("--wheel", type=Path, required=True)
    parser.add_argument("--constraints", type=Path, required=True)
    parser.add_argument("--checkout", type=Path, required=True, help="where blocks marked 'in the checkout' run")
    parser.add_argument("--directory", type=Path, required=True, help="where all others run")
    parser.add_argument("--timeout", type=float, default=1200.0, help="seconds for one command")
    args = parser.parse_args()

    passed = failed = skipped = 0
    for step in steps(args.readme.read_text()):
        print(f"\n--- README line {step.line}: {step.language}\n{step.text.rstrip()}")
        if step.skipped is not None:
            print(f"not run: {step.skipped}")
            skipped += 1
            continue
        command = with_wheel(step.text, wheel=args.wheel, constraints=args.constraints)
        if command != step.text:
            print(f"the wheel just built stands in for the release: {command}")
        sys.stdout.flush()
        began = time.monotonic()
        directory = args.checkout if step.in_checkout else args.directory
        code = run(step, command, directory=directory, timeout=args.timeout)
        print(f"exit code {code} after {time.monotonic() - began:.1f} s")
        passed, failed = passed + (code == 0), failed + (code != 0)
        if failed:
            break
    print(f"\n{passed} passed, {failed} failed, {skipped} skipped")
    return 1 if failed or not passed else 0


if __name__ == "__main__":
    sys.exit(main())
