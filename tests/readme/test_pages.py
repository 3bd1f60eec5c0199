"""Pages that quote the program say what it says, and pages that point at files point at files that are there."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = ("coming_from.md", "configuration.md", "reasoning.md", "troubleshooting.md", "when_not.md")
MESSAGES = re.findall(r"^### `(.+)`$", (DOCS / "troubleshooting.md").read_text(encoding="utf-8"), flags=re.MULTILINE)
GAP = "\0"  # where a name or number stands in a message


def texts() -> Iterator[str]:
    """Every string of the package, with gaps where f-strings have values."""
    for path in sorted((ROOT / "kdlib").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield node.value
            elif isinstance(node, ast.JoinedStr):
                yield "".join(str(part.value) if isinstance(part, ast.Constant) else GAP for part in node.values)


TEXTS = list(texts())


def test_there_are_messages_and_none_twice() -> None:
    assert len(MESSAGES) >= 25 and len(set(MESSAGES)) == len(MESSAGES)


@pytest.mark.parametrize("message", MESSAGES)
def test_every_heading_is_what_the_program_says(message: str) -> None:
    """Its fixed words, in their order, are those of one string of the source; ``...`` is whatever stands between them."""
    words = [part for part in message.split("...") if part.strip()]
    pattern = re.compile(".*?".join(re.escape(part.strip()) for part in words))
    assert any(pattern.search(text) for text in TEXTS), message


def test_every_message_is_explained_in_a_few_lines() -> None:
    page = (DOCS / "troubleshooting.md").read_text(encoding="utf-8")
    for section in page.split("\n### ")[1:]:
        said = section.partition("\n")[2].partition("\n## ")[0].strip().splitlines()
        assert 1 <= len(said) <= 5, section.partition("\n")[0]


@pytest.mark.parametrize("name", PAGES)
def test_links_lead_to_pages_and_headings_that_are_there(name: str) -> None:
    text = (DOCS / name).read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith("http"):
            continue
        path, _, anchor = target.partition("#")
        page = DOCS / path if path else DOCS / name
        assert page.exists(), target
        assert not anchor or anchor in anchors(page), target


def anchors(page: Path) -> set[str]:
    """A page's headings as links name them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
