"""``kdlib jacobi``: from rows or trajectories to a model that is measured, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM

from kdlib.cli.jacobi import JacobiRun
from kdlib.cli.measured import measured_rows
from kdlib.cli.parsing import parse
from kdlib.cli.recipes import recipes
from kdlib.cli.run_directory import RunDirectory
from tests.cli.conftest import Command, conversation, tree, write_rows

MEASURE = {"evaluate.limit": 4, "evaluate.max_new_tokens": 8, "evaluate.batch_size": 2, "evaluate.timing": "false"}
NOTHING = {"evaluate.limit": 0}
EXAMPLE = Path(__file__).parents[2] / "examples" / "jacobi.yaml"


@pytest.fixture
def words(options: dict[str, Any]) -> dict[str, Any]:
    """A run of two steps whose teacher is the student itself."""
    return {**{name: value for name, value in options.items() if name != "teacher"}, "block_size": 4}


def metrics(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_a_run_ends_with_tokens_per_forward_before_and_after(kdlib: Command, words: dict[str, Any]) -> None:
    done = kdlib("jacobi", **words, **MEASURE, report_to="none")
    assert done.code == 0, done.err
    run = words["output_dir"]
    found = json.loads((run / "eval" / "jacobi.json").read_text())
    assert list(found) == ["base", "trained"]
    for result in found.values():
        assert result["prompts"] == 4 and result["block_size"] == 4
        assert 1.0 <= result["tokens_per_forward"]["value"] <= 4.0
        assert result["agreement"]["identical"] == 4, "decoded as greedy decoding would"
    assert "tokens per forward" in (run / "report.html").read_text()
    card = (run / "final" / "README.md").read_text()
    for result, what in ((found["base"], "tokens per forward, before"), (found["trained"], "tokens per forward")):
        said = "{value:.3f} [{low:.3f}, {high:.3f}]".format(**result["tokens_per_forward"])
        assert f"| {what} | {said} | 4 |" in card
        assert any(what in line and f"{said} (n=4)" in line for line in done.out.splitlines())
    assert {"ar/cross_entropy", "kl_forward", "scored_tokens"} <= metrics(run)[0].keys()
    assert AutoModelForCausalLM.from_pretrained(run / "final").config.model_type == "llama"
    assert f"next    kdlib evaluate jacobi --model {run / 'final'} --base {words['model']} --block_size 4" in done.out

    before = tree(run / "final")
    again = kdlib("jacobi", **words, **MEASURE, report_to="none")
    assert again.code == 0 and "finished; --overwrite true starts it anew" in again.err
    changed = kdlib("jacobi", **words, **MEASURE, report_to="none", schedule="progressive")
    assert changed.code == 2 and "schedule: uniform -> progressive" in changed.err
    assert len(changed.err.strip().splitlines()) == 1 and tree(run / "final") == before


def test_what_was_measured_becomes_rows(tmp_path: Path) -> None:
    """Acceptance and tokens per forward where their files are there; an estimate without bounds has no interval."""
    assert measured_rows(RunDirectory(tmp_path)) == []
    (tmp_path / "eval").mkdir()
    one = {"prompts": 1, "tokens_per_forward": {"value": 1.23456, "low": None, "high": None}}
    (tmp_path / "eval" / "jacobi.json").write_text(json.dumps({"trained": one}))
    assert measured_rows(RunDirectory(tmp_path)) == [["tokens per forward", "1.235", "1"]]
    length = {"value": 2.5, "low": 2.0, "high": 3.0}
    way = {"num_speculative_tokens": 3, "draft_sample_method": "greedy", "acceptance_length": length}
    (tmp_path / "eval" / "acceptance.json").write_text(json.dumps({"prompts": 7, "empirical": [way]}))
    first, second = measured_rows(RunDirectory(tmp_path))
    assert first == ["acceptance_length, 3 speculative tokens, greedy draft", "2.500 [2.000, 3.000]", "7"]
    assert second == ["tokens per forward", "1.235", "1"]


def test_prompts_without_room_are_no_reason_to_lose_the_run(kdlib: Command, words: dict[str, Any], tmp_path: Path) -> None:
    """In a context of 512 tokens: one prompt of four is too long, then all are."""
    rows = [conversation("plus " * (500 if i == 1 else 2), f"It is {i}.") for i in range(4)]
    words = {**words, **MEASURE, "max_steps": 1, "dataset_name": write_rows(tmp_path / "rows.jsonl", rows)}
    for tokens, prompts in ((8, 3), (511, 0)):
        run = tmp_path / str(tokens)
        done = kdlib("jacobi", **{**words, "output_dir": run, "evaluate.max_new_tokens": tokens})
        assert done.code == 0, done.err
        assert (run / "final" / "model.safetensors").is_file()
        assert ("tokens per forward are not measured: there are no prompts" in done.err) == (prompts == 0)
        if prompts:
            assert json.loads((run / "eval" / "jacobi.json").read_text())["trained"]["prompts"] == prompts


def test_trajectories_train_by_every_method(kdlib: Command, words: dict[str, Any], tmp_path: Path) -> None:
    made = {name: words[name] for name in ("model", "dataset_name", "block_size")}
    done = kdlib("trajectories", "jacobi", **made, output_dir=tmp_path / "states", max_completion_length=10)
    assert done.code == 0, done.err
    methods = {
        "global": {},
        "local": {"consistency": "local"},
        "forcing": {"schedule": "progressive", "context": "noisy", "window_size": 2},
        "mixed": {"ar_labels": "mixed", "objective": "ReverseKL", "teacher": "{SelfTeacher: {kind: ema}}"},
    }
    losses = []
    for name, more in methods.items():
        run = tmp_path / name
        done = kdlib("jacobi", **{**words, **NOTHING, **more, "dataset_name": tmp_path / "states", "output_dir": run})
        assert done.code == 0, done.err
        assert not (run / "eval" / "jacobi.json").exists()
        losses.append(metrics(run)[0]["loss"])
    assert len(set(losses)) == 4
    refused = kdlib("jacobi", **{**words, "dataset_name": tmp_path / "states", "block_size": 8})
    assert refused.code == 2 and "states are of block_size [4], not 8" in refused.err


@pytest.mark.parametrize("file", [recipes()["jacobi"], EXAMPLE], ids=["recipe", "example"])
def test_every_recipe_is_a_configuration_that_parses(file: Path) -> None:
    options = parse("jacobi", "", JacobiRun.classes(), ["--config", str(file)])
    assert options is not None and options.config["output_dir"].startswith("runs/")
    JacobiRun.check(options)
    JacobiRun(options, words=[], quiet=True)


def test_an_adapter_is_trained_merged_and_measured(kdlib: Command, words: dict[str, Any]) -> None:
    done = kdlib("jacobi", **words, **MEASURE, use_peft="true", teacher="{SelfTeacher: {kind: adapter_off}}")
    assert done.code == 0, done.err
    run = words["output_dir"]
    assert (run / "final" / "model.safetensors").is_file() and not (run / "final" / "adapter_config.json").exists()
    assert json.loads((run / "eval" / "jacobi.json").read_text())["trained"]["prompts"] == 4


def test_the_students_own_answers_need_prompts_alone(kdlib: Command, words: dict[str, Any], tmp_path: Path) -> None:
    rows = tmp_path / "prompts.jsonl"
    rows.write_text("".join(json.dumps({"prompt": f"What is {i} plus two?"}) + "\n" for i in range(8)))
    options = {"on_policy_fraction": 1, "max_completion_length": 8, "rollout.temperature": 0}
    done = kdlib("jacobi", **{**words, **MEASURE, **options, "dataset_name": rows})
    assert done.code == 0, done.err
    assert metrics(words["output_dir"])[0]["completions/mean_length"] > 1


def test_preview_shows_rows_and_trains_nothing(kdlib: Command, words: dict[str, Any]) -> None:
    shown = kdlib("jacobi", **words, preview=2)
    assert shown.code == 0 and "It is 2." in shown.out and "It is 3." in shown.out
    assert not words["output_dir"].exists()


def test_help_names_the_options(kdlib: Command) -> None:
    shown = kdlib("jacobi", "--help")
    assert shown.code == 0
    for name in ("block_size", "state_source", "consistency", "schedule", "context", "ar_weight", "evaluate.limit"):
        assert f"--{name}" in shown.out, name
    assert "Jacobi decoding" in shown.out and "several tokens per forward pass" in kdlib("--help").out


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"block_size": 1}, "block_size must be at least 2"),
        ({"schedule": "linear"}, "schedule"),
        ({"context": "noisy", "consistency": "local"}, "leave out consistency local"),
        ({"state_source": "stored"}, "make them with kdlib trajectories jacobi"),
        ({"ar_labels": "dataset"}, "ar_labels dataset needs rows of kdlib trajectories jacobi"),
        ({"objective": "SelectiveKL"}, "SelectiveKL"),
        ({"teacher": "http://127.0.0.1:9/v1"}, "127.0.0.1"),
        ({"teacher": "{SelfTeacher: {kind: adapter_off}}"}, "needs a student with an adapter"),
        ({"packing": "true"}, "packing puts samples into one row"),
        ({"evaluate.max_new_tokens": 1}, "evaluate.max_new_tokens"),
        ({"evaluate.limit": -1}, "evaluate.limit"),
        ({"eval_strategy": "steps"}, "--eval_dataset_name"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_one_line(kdlib: Command, words: dict[str, Any], given: dict[str, Any], message: str) -> None:
    outcome = kdlib("jacobi", **{**words, **given})
    assert outcome.code == 2 and message in outcome.err and len(outcome.err.splitlines()) == 1, outcome.err
    assert not words["output_dir"].exists()
