"""``kdlib recipes``: YAML recipes, accelerate configurations and SLURM scripts that come with the package."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

from rich.console import Console
from rich.table import Table

USAGE = "usage: kdlib recipes list | kdlib recipes copy NAME [DIR]"
SUFFIXES = (".yaml", ".sh")


def run(words: list[str]) -> int:
    console = Console(soft_wrap=True, highlight=False)
    if not words or words[0] in ("-h", "--help"):
        console.print(USAGE, markup=False)
        return 0
    if words == ["list"]:
        console.print(_table())
        return 0
    if words[0] == "copy" and len(words) in (2, 3):
        console.print(f"wrote {_copy(words[1], Path(words[2] if len(words) == 3 else '.'))}", markup=False)
        return 0
    raise ValueError(USAGE)


def recipes() -> dict[str, Path]:
    """{name: file}; accelerate configurations are named accelerate/NAME, scripts slurm/NAME."""
    root = Path(str(files("kdlib") / "recipes"))
    found = sorted(path for path in root.rglob("*") if path.suffix in SUFFIXES)
    return {str(path.relative_to(root).with_suffix("")): path for path in found}


def _table() -> Table:
    table = Table(title="recipes", title_justify="left")
    table.add_column("name")
    table.add_column("what it does")
    for name, path in recipes().items():
        table.add_row(name, _first_comment(path))
    return table


def _first_comment(path: Path) -> str:
    """What a file says of itself, below the line that names a script's shell."""
    return next(line[2:] for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("# "))


def _copy(name: str, directory: Path) -> Path:
    known = recipes()
    if name not in known:
        raise ValueError(f"no recipe {name}: choose {', '.join(known)}")
    directory.mkdir(parents=True, exist_ok=True)
    target = directory / known[name].name
    if target.exists():
        raise ValueError(f"{target} exists: delete it, or give another directory")
    target.write_text(known[name].read_text(encoding="utf-8"), encoding="utf-8")
    return target
