"""``kdlib draft``: forms of drafts, the reference it trains first, and the acceptance it ends with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM

from kdlib.cli.draft import DraftRun
from kdlib.cli.parsing import parse
from kdlib.cli.recipes import recipes
from tests.cli.conftest import Command, conversation, write_rows
from tests.tiny import tiny_llama, tiny_tokenizer

MEASURE = {"evaluate.limit": 4, "evaluate.max_new_tokens": 8, "evaluate.num_speculative_tokens": "2"}


def metrics(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_a_run_ends_with_what_its_target_accepts(kdlib: Command, options: dict[str, Any]) -> None:
    done = kdlib("draft", **options, **MEASURE, objective="LKHybrid")
    assert done.code == 0, done.err
    run = options["output_dir"]
    found = json.loads((run / "eval" / "acceptance.json").read_text())
    assert found["prompts"] == 4 and found["empirical"][0]["num_speculative_tokens"] == 2
    assert 1.0 <= found["empirical"][0]["acceptance_length"]["value"] <= 3.0
    assert "acceptance_length, 2 speculative tokens" in done.out
    assert "Acceptance" in (run / "report.html").read_text()
    assert "acceptance_length" in (run / "final" / "README.md").read_text()
    assert metrics(run)[0]["draft_tokens"] == metrics(run)[0]["target_tokens"] > 0
    assert f"next    kdlib export draft --draft {run / 'final'}" in done.out
    assert kdlib("draft", **options, **MEASURE, objective="LKHybrid").code == 0


def test_prompts_without_room_are_no_reason_to_lose_the_run(kdlib: Command, options: dict[str, Any], tmp_path: Path) -> None:
    """In a context of 512 tokens: one prompt of four is too long, then all are."""
    rows = [conversation("plus " * (500 if i == 1 else 2), f"It is {i}.") for i in range(4)]
    words = {**options, **MEASURE, "max_steps": 1, "dataset_name": write_rows(tmp_path / "rows.jsonl", rows)}
    for tokens, prompts in ((8, 3), (511, 0)):
        run = tmp_path / str(tokens)
        done = kdlib("draft", **{**words, "output_dir": run, "evaluate.max_new_tokens": tokens})
        assert done.code == 0, done.err
        assert (run / "final" / "model.safetensors").is_file()
        assert ("acceptance is not measured: there are no prompts" in done.err) == (prompts == 0)
        if prompts:
            assert json.loads((run / "eval" / "acceptance.json").read_text())["prompts"] == prompts


def test_adaspec_trains_its_reference_first_and_once(kdlib: Command, options: dict[str, Any]) -> None:
    words = {**options, "objective": "SelectiveKL", "objective.fraction": 0.5, "reference": "train", "evaluate.limit": 0}
    done = kdlib("draft", **words)
    assert done.code == 0, done.err
    run = options["output_dir"]
    reference = run.with_name("run-reference")
    before = (reference / "final" / "model.safetensors").stat().st_mtime_ns
    scored, chosen = (metrics(where)[0]["scored_tokens"] for where in (reference, run))
    assert scored / 2 <= chosen <= scored / 2 + 1
    assert not (run / "eval" / "acceptance.json").exists()
    again = kdlib("draft", **words)
    assert again.code == 0 and (reference / "final" / "model.safetensors").stat().st_mtime_ns == before


def test_layers_of_the_target_make_a_draft(kdlib: Command, options: dict[str, Any]) -> None:
    done = kdlib("draft", **{**options, "model": "{prune: {layers: [1]}}", "evaluate.limit": 0})
    assert done.code == 0, done.err
    made = AutoModelForCausalLM.from_pretrained(options["output_dir"] / "final")
    assert made.config.num_hidden_layers == 1


def test_a_head_is_trained_measured_and_gone_on_from(kdlib: Command, options: dict[str, Any], place: Path) -> None:
    target = place / "deep"
    if not target.exists():
        tokenizer = tiny_tokenizer()
        tokenizer.save_pretrained(target)
        tiny_llama(len(tokenizer), seed=3, layers=4).save_pretrained(target)
    words = {**options, **MEASURE, "teacher": target, "max_length": 64}
    done = kdlib("draft", **{**words, "model": "{eagle3: {ttt_steps: 2, draft_vocab_size: 64}}"})
    assert done.code == 0, done.err
    run = options["output_dir"]
    assert {"acceptance/step_0", "acceptance/step_1"} <= metrics(run)[0].keys()
    found = json.loads((run / "eval" / "acceptance.json").read_text())
    assert 1.0 <= found["empirical"][0]["acceptance_length"]["value"] <= 3.0
    assert 0.0 < found["expected"]["greedy"]["acceptance_rate"]["value"] < 1.0 or found["response_tokens"] < 40
    further = kdlib("draft", **{**words, "model": run / "final", "output_dir": run.with_name("further")})
    assert further.code == 0, further.err
    refused = kdlib("draft", **{**words, "model": "{eagle3: {ttt_step: 2}}", "output_dir": run.with_name("third")})
    assert refused.code == 2 and "did you mean ttt_steps?" in refused.err


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"model": "{prune: {layer: [0]}}"}, "the draft is a path"),
        ({"model": "{prune: {layers: [7]}}"}, "7"),
        ({"model": "{shrink: 2}"}, "the draft is a path"),
        ({"model": "{prune: {layers: [0]}}", "teacher": "http://127.0.0.1:9/v1"}, "a path or Hub id here"),
        ({"objective": "SelectiveKL"}, "--reference train"),
        ({"objective": "SelectiveKL", "reference": "train", "num_processes": 2}, "in one process"),
        ({"reference": "train", "objective": "ForwardKL"}, "SelectiveKL alone"),
        ({"evaluate.num_speculative_tokens": "0", "evaluate.limit": 1}, "at least 1"),
    ],
)
def test_what_does_not_fit_is_one_line(kdlib: Command, options: dict[str, Any], given: dict[str, Any], message: str) -> None:
    outcome = kdlib("draft", **{**options, **given})
    assert outcome.code == 2 and message in outcome.err and len(outcome.err.splitlines()) == 1, outcome.err
    assert not (options["output_dir"]).exists()
    assert not options["output_dir"].with_name("run-reference").exists()


def test_distill_names_the_command_that_selects(kdlib: Command, options: dict[str, Any]) -> None:
    outcome = kdlib("distill", **options, objective="SelectiveKL")
    assert outcome.code == 2 and "kdlib draft" in outcome.err


FILES = [path for name, path in recipes().items() if name.startswith("draft")]


@pytest.mark.parametrize("file", [*FILES, Path(__file__).parents[2] / "examples" / "draft.yaml"], ids=lambda file: file.stem)
def test_every_recipe_is_a_configuration_that_parses(file: Path) -> None:
    options = parse("draft", "", DraftRun.classes(), ["--config", str(file)])
    assert options is not None and options.config["output_dir"].startswith("runs/")
    DraftRun.check(options)
    DraftRun(options, words=[], quiet=True)
