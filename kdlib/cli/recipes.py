"""``kdlib recipes``: YAML recipes and accelerate configurations that come with the package."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

from rich.console import Console
from rich.table import Table

USAGE = "usage: kdlib recipes list | kdlib recipes copy NAME [DIR]"


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
    """{name: file}; accelerate configurations are named accelerate/NAME."""
    root = Path(str(files("kdlib") / "recipes"))
    return {str(path.relative_to(root).with_suffix("")): path for path in sorted(root.rglob("*.yaml"))}


def _table() -> Table:
    table = Table(title="recipes", title_justify="left")
    table.add_column("name")
    table.add_column("what it does")
    for name, path in recipes().items():
        table.add_row(name, path.read_text().splitlines()[0].lstrip("# "))
    return table


def _copy(name: str, directory: Path) -> Path:
    known = recipes()
    if name not in known:
        raise ValueError(f"no recipe {name}: choose {', '.join(known)}")
    directory.mkdir(parents=True, exist_ok=True)
    target = directory / known[name].name
    if target.exists():
        raise ValueError(f"{target} exists: delete it, or give another directory")
    target.write_text(known[name].read_text())
    return target
