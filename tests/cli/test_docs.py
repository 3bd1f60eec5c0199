"""docs/configuration.md lists every option of ours with the default it has."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path

import pytest

from kdlib.cli.arguments import AdapterArguments, LaunchArguments, RunArguments
from kdlib.cli.diffusion import DecodingArguments, DiffusionMeasureArguments
from kdlib.cli.draft import DraftArguments, MeasureArguments
from kdlib.cli.evaluation.jacobi import DecoderArguments
from kdlib.cli.help import docs, nested, shown_default
from kdlib.cli.jacobi import MeasureArguments as JacobiMeasure
from kdlib.cli.names import LEFT_OUT, RENAMED
from kdlib.cli.run_directory import COMMAND, FREE
from kdlib.cli.scoring import ScoringArguments
from kdlib.decoding import DiffusionDecoder
from kdlib.decoding.strategies import STRATEGIES
from kdlib.trainers import DiffusionConfig, JacobiConfig
from kdlib.trainers.config import DistillationConfig
from kdlib.trainers.rows_config import RowsConfig

DOCS = Path(__file__).parents[2] / "docs"
PAGE = (DOCS / "configuration.md").read_text(encoding="utf-8")


def rows(page: str) -> dict[str, str]:
    """{option: default} of a page's tables."""
    return dict(re.findall(r"^\| `([\w.]+)` \| (.*?) ?\| .+ \|$", page, flags=re.MULTILINE))


ROWS = rows(PAGE)


@pytest.mark.parametrize(
    "cls", [RunArguments, AdapterArguments, ScoringArguments, LaunchArguments, DistillationConfig, RowsConfig]
)
def test_options_and_defaults_are_those_of_the_code(cls: type) -> None:
    for name in docs(cls):
        if name in nested(cls):
            continue
        assert ROWS.get(name) == shown_default(cls, name), name
    for name, part in nested(cls).items():
        for key in docs(part):
            assert ROWS.get(f"{name}.{key}") == shown_default(part, key), f"{name}.{key}"


def test_options_of_drafts_are_on_their_page() -> None:
    found = rows((DOCS / "draft.md").read_text(encoding="utf-8"))
    assert found["reference"] == shown_default(DraftArguments, "reference")
    for key in docs(MeasureArguments):
        assert found[f"evaluate.{key}"] == shown_default(MeasureArguments, key), key


def test_options_of_jacobi_are_on_their_pages() -> None:
    found = rows((DOCS / "jacobi.md").read_text(encoding="utf-8"))
    for key in set(docs(JacobiConfig)) - set(docs(DistillationConfig)):
        assert found[key] == shown_default(JacobiConfig, key), key
    for key in docs(JacobiMeasure):
        assert found[f"evaluate.{key}"] == shown_default(JacobiMeasure, key), key
    decoder = rows((DOCS / "jacobi_decoding.md").read_text(encoding="utf-8"))
    assert decoder == {key: shown_default(DecoderArguments, key) for key in docs(DecoderArguments)}


def test_options_of_diffusion_are_on_their_pages() -> None:
    found = rows((DOCS / "dllm.md").read_text(encoding="utf-8"))
    expected = {key: shown_default(DiffusionConfig, key) for key in set(docs(DiffusionConfig)) - set(docs(DistillationConfig))}
    expected |= {f"decoding.{key}": shown_default(DecodingArguments, key) for key in docs(DecodingArguments)}
    expected |= {f"evaluate.{key}": shown_default(DiffusionMeasureArguments, key) for key in docs(DiffusionMeasureArguments)}
    assert {key: found[key] for key in expected} == expected


def test_strategies_and_the_decoder_are_on_their_page() -> None:
    page = (DOCS / "dllm_decoding.md").read_text(encoding="utf-8")
    found = rows(page.partition("## Strategies")[0])
    for option in fields(DiffusionDecoder):
        value = getattr(DiffusionDecoder(), option.name)
        shown = type(value).__name__ if option.name == "strategy" else "" if value is None else str(value)
        assert found[option.name] == shown, option.name
    table = page.partition("## Strategies")[2].partition("## Caches")[0]
    said = dict(re.findall(r"^\| `(\w+)` \|.*\| (.*?) \| [^|]*\|$", table, flags=re.MULTILINE))
    assert said.keys() == STRATEGIES.keys()
    for name, strategy in STRATEGIES.items():
        assert set(re.findall(r"`(\w+)`", said[name])) == {option.name for option in fields(strategy)}, name  # type: ignore[arg-type]


def test_names_of_others_are_those_that_the_command_knows() -> None:
    page = (DOCS / "coming_from.md").read_text(encoding="utf-8")
    table = page.partition("## TRL\n")[2].partition("## GOLD in TRL")[0]
    named = {name for line in table.splitlines() for name in re.findall(r"`(\w+)`", line.split("|")[1] if "|" in line else "")}
    assert named and named <= RENAMED.keys() | LEFT_OUT.keys()


def test_what_may_change_is_what_the_code_lets_change() -> None:
    sentence = re.search(r"may change: (.*?)\.", PAGE, flags=re.DOTALL)
    assert sentence is not None
    assert set(re.findall(r"`(\w+)`", sentence[1])) == {*COMMAND, *FREE} - {"overwrite", "preview"}
