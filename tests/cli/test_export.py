"""``kdlib export draft``: drafts and heads written by the command, and mistakes in one line."""

from __future__ import annotations

import ast
import json
import shlex
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from kdlib.cli.main import main
from kdlib.drafts import formats
from kdlib.drafts.eagle3 import Eagle3Draft
from kdlib.drafts.eagle3_config import Eagle3Config
from tests.cli.conftest import Command, Outcome
from tests.tiny import tiny_llama, tiny_tokenizer

TOKENS = len(tiny_tokenizer())


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """target/ (padded), draft/ and head/ (EAGLE-3)."""
    root = tmp_path_factory.mktemp("models")
    target = tiny_llama(TOKENS + 8, layers=4)
    for name, model in (("target", target), ("draft", tiny_llama(TOKENS, seed=1))):
        model.save_pretrained(root / name)
        tiny_tokenizer().save_pretrained(root / name)
    formats.write(Eagle3Draft(Eagle3Config.of_target(target.config)), root / "head", format="eagle")
    return root


def line(outcome: Outcome, start: str) -> str:
    [found] = [text for text in outcome.out.splitlines() if text.startswith(start)]
    return found.removeprefix(start).strip()


def test_a_draft_is_written_and_the_words_to_type_are_printed(kdlib: Command, models: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = kdlib("export", "draft", draft=models / "draft", target=models / "target", output_path=out, num_speculative_tokens=5)
    assert done.code == 0, done.err
    assert AutoModelForCausalLM.from_pretrained(out).config.vocab_size == TOKENS + 8
    assert f"vocab_size is now {TOKENS + 8}" in done.out and "p(argmax q)" in done.out
    command = shlex.split(line(done, "serve"))
    config = json.loads(command[-1])
    assert command[:-1] == ["vllm", "serve", str(models / "target"), "--speculative-config"]
    assert config["model"] == str(out) and config["num_speculative_tokens"] == 5 and config["draft_sample_method"] == "greedy"
    python = line(done, "python")
    start = f"LLM({str(models / 'target')!r}, speculative_config="
    assert python.startswith(start) and ast.literal_eval(python.removeprefix(start).removesuffix(")")) == config


def test_probabilistic_drafts_need_no_explanation(kdlib: Command, models: Path, tmp_path: Path) -> None:
    options = {"draft": models / "draft", "target": models / "target", "output_path": tmp_path / "out"}
    done = kdlib("export", "draft", draft_sample_method="probabilistic", **options)
    assert done.code == 0 and "drafts greedily" not in done.out and '"draft_sample_method": "probabilistic"' in done.out


@pytest.mark.parametrize(("asked", "served"), [(None, "out"), ("speculators", "out"), ("eagle", "target")])
def test_a_head_goes_to_its_format(kdlib: Command, models: Path, tmp_path: Path, asked: str | None, served: str) -> None:
    options = {"draft": models / "head", "target": models / "target", "output_path": tmp_path / "out"}
    done = kdlib("export", "draft", **options, **({"format": asked} if asked else {}))
    assert done.code == 0, done.err
    assert shlex.split(line(done, "serve"))[2] == str({"out": tmp_path / "out", "target": models / "target"}[served])
    assert ("speculators_model_type" in json.loads((tmp_path / "out" / "config.json").read_text())) == (served == "out")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"draft": "head", "format": "hf"}, "is an EAGLE-3 head: give --format eagle or speculators"),
        ({"draft": "head", "draft_sample_method": "probabilistic"}, "add it to the printed --speculative-config"),
        ({"draft": "draft", "format": "eagle"}, "is no EAGLE-3 head: --format hf"),
        ({"draft": "draft", "output_path": "my-eagle3"}, "for a draft of another method"),
        ({"draft": "nowhere"}, "does not exist"),
    ],
)
def test_mistakes_are_one_line(kdlib: Command, models: Path, tmp_path: Path, options: dict[str, str], message: str) -> None:
    given = {**options, "draft": models / options["draft"], "output_path": tmp_path / options.get("output_path", "out")}
    done = kdlib("export", "draft", target=models / "target", **given)
    assert done.code == 2 and message in done.err and done.err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_what_is_exported_comes_first(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", "--help"]) == 0
    assert main(["export", "model"]) == 2
    assert capsys.readouterr().err.startswith("kdlib export: usage: kdlib export draft --draft DIR")
    assert main(["export", "draft", "--help"]) == 0
    assert "--num_speculative_tokens" in capsys.readouterr().out
