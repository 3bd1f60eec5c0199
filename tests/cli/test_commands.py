"""Whole commands on tiny models: what they print, write, refuse, resume, and leave alone."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.cli.conftest import Command, conversation, tree, write_rows

WRITTEN = {"command.txt", "config.yaml", "environment.json", "metrics.jsonl", "plan.json", "report.html"}
LEFT_BEHIND = WRITTEN | {"checkpoint-2", "eval", "final", "samples"}
STOPS_ITSELF = '''
import os, signal
from dataclasses import dataclass
from kdlib.objectives import ForwardKL

calls = 0

@dataclass(frozen=True, kw_only=True)
class Stopping(ForwardKL):
    """ForwardKL that sends the process a SIGTERM in its second step, where the environment says so."""

    def row(self, q, p, labels):
        global calls
        calls += 1
        if calls == 2 and "KDLIB_TEST_STOP" in os.environ:
            signal.raise_signal(signal.SIGTERM)
        return super().row(q, p, labels)
'''
TASK = """
task: tiny_sums
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: ["two", "four"]
doc_to_target: 1
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""


@pytest.fixture
def task(tmp_path: Path) -> Path:
    """A directory with a local lm-eval task of four questions."""
    folder = tmp_path / "tasks"
    folder.mkdir()
    data = write_rows(folder / "sums.jsonl", [{"question": f"{i} plus two?"} for i in range(4)])
    (folder / "tiny_sums.yaml").write_text(TASK.format(data=data))
    return folder


def test_a_run_leaves_a_loadable_student_and_the_same_command_shows_it(
    kdlib: Command, options: dict[str, Any], place: Path
) -> None:
    first = kdlib("distill", **options, eval_dataset_name=place / "rows.jsonl")
    run = options["output_dir"]
    assert first.code == 0, first.err
    assert {path.name for path in run.iterdir()} == LEFT_BEHIND
    assert f"model   {run / 'final'}" in first.out and f"next    kdlib evaluate --model {run / 'final'}" in first.out
    AutoModelForCausalLM.from_pretrained(run / "final")
    assert AutoTokenizer.from_pretrained(run / "final").chat_template
    card = (run / "final" / "README.md").read_text()
    assert all(word in card for word in (str(options["teacher"]), "ForwardKL(", "eval_kl_forward", "kdlib distill"))
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in metrics if "grad_norm" in line] == [1, 2]

    before = tree(run)
    second = kdlib("distill", **options, eval_dataset_name=place / "rows.jsonl")
    assert second.code == 0 and "holds this run, finished" in second.err
    assert tree(run) == before
    third = kdlib("distill", **{**options, "max_steps": 3}, eval_dataset_name=place / "rows.jsonl")
    assert third.code == 2 and "max_steps: 2 -> 3" in third.err and third.err.count("\n") == 1
    assert tree(run) == before


def test_as_a_process_it_says_what_it_does_and_nothing_else(options: dict[str, Any]) -> None:
    """Libraries' bars, log lines and warnings would drown what matters."""
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    call = [sys.executable, "-m", "kdlib", "distill", *words, "--disable_tqdm"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_DATASETS")}
    done = subprocess.run(call, capture_output=True, text=True, env=environment, check=True)
    assert re.fullmatch(r"student [\d,]+ parameters .*, 16 rows, .* 2 steps\nmemory .*\n", done.stderr)


def test_config_yaml_is_the_run(kdlib: Command, options: dict[str, Any], tmp_path: Path) -> None:
    assert kdlib("distill", **options, objective="{GeneralizedJSD: {beta: 0.2}}").code == 0
    held = yaml.safe_load((options["output_dir"] / "config.yaml").read_text())
    assert held["objective"]["GeneralizedJSD"]["beta"] == 0.2
    assert not {"local_rank", "num_processes", "overwrite", "preview"} & held.keys()
    again = kdlib("distill", config=options["output_dir"] / "config.yaml")
    assert again.code == 0 and "finished" in again.err
    other = kdlib("distill", config=options["output_dir"] / "config.yaml", output_dir=tmp_path / "other")
    assert other.code == 0
    ours, theirs = (path / "final" / "model.safetensors" for path in (options["output_dir"], tmp_path / "other"))
    assert ours.read_bytes() == theirs.read_bytes()


def test_sigterm_saves_and_the_same_command_goes_on_to_the_same_weights(
    kdlib: Command, options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "stops.py").write_text(STOPS_ITSELF)
    options |= {"objective": f"{tmp_path / 'stops.py'}:Stopping", "max_steps": 4}
    whole = kdlib("distill", **{**options, "output_dir": tmp_path / "whole"})
    assert whole.code == 0, whole.err
    monkeypatch.setenv("KDLIB_TEST_STOP", "1")
    stopped = kdlib("distill", **options)
    assert stopped.code == 128 + signal.SIGTERM
    assert "the same command resumes" in stopped.err and not (options["output_dir"] / "final").exists()
    monkeypatch.delenv("KDLIB_TEST_STOP")
    resumed = kdlib("distill", **options)
    assert resumed.code == 0 and "resuming from" in resumed.err
    weights = [path / "final" / "model.safetensors" for path in (options["output_dir"], tmp_path / "whole")]
    assert weights[0].read_bytes() == weights[1].read_bytes()


def test_a_new_student_learns_from_a_cache_that_needs_no_teacher(
    kdlib: Command, options: dict[str, Any], place: Path, tmp_path: Path
) -> None:
    signals = tmp_path / "signals"
    made = kdlib("cache", teacher=place / "teacher", dataset_name=place / "rows.jsonl", output_dir=signals, k=8)
    assert made.code == 0 and "bytes a token, k=8, topk" in made.out
    assert f"kdlib distill --teacher {signals} --dataset_name {place / 'rows.jsonl'}" in made.out
    before = tree(signals)
    assert kdlib("cache", teacher=place / "teacher", dataset_name=place / "rows.jsonl", output_dir=signals, k=8).code == 0
    assert tree(signals).keys() == before.keys()

    overrides = "{hidden_size: 16, num_hidden_layers: 1}"
    options |= {"teacher": signals, "from_scratch": "true", "config_overrides": overrides}
    assert kdlib("distill", **options).code == 0
    student = AutoModelForCausalLM.from_pretrained(options["output_dir"] / "final")
    assert student.config.hidden_size == 16
    assert "teacher, cached in" in (options["output_dir"] / "final" / "README.md").read_text()

    refused = kdlib("distill", **{**options, "model": place / "stranger", "output_dir": tmp_path / "new"})
    assert refused.code == 2 and "written with another tokenizer" in refused.err
    warmer = kdlib("distill", **{**options, "output_dir": tmp_path / "new", "objective.temperature": 2})
    assert warmer.code == 2 and "temperature" in warmer.err
    assert not (tmp_path / "new").exists()


def test_adapters_and_tasks_are_scored_in_final(kdlib: Command, options: dict[str, Any], task: Path) -> None:
    pytest.importorskip("lm_eval")
    options |= {"use_peft": "true", "lora_target_modules": "q_proj,v_proj", "tasks": "tiny_sums", "include_path": task}
    outcome = kdlib("distill", **options)
    assert outcome.code == 0, outcome.err
    run = options["output_dir"]
    assert "tiny_sums acc" in outcome.out and (run / "final" / "model.safetensors").is_file()
    scores = json.loads((run / "eval" / "final.json").read_text())
    assert 0 <= scores["results"]["tiny_sums"]["acc,none"] <= 1
    assert "tiny_sums acc" in (run / "final" / "README.md").read_text()
    assert "tiny_sums" in (run / "report.html").read_text()


def test_evaluate_scores_tasks_text_and_divergence_in_one_table(
    kdlib: Command, place: Path, task: Path, tmp_path: Path
) -> None:
    pytest.importorskip("lm_eval")
    target = tmp_path / "scores.json"
    given = {"model": place / "student", "teacher": place / "teacher", "dataset_name": place / "rows.jsonl"}
    outcome = kdlib("evaluate", **given, tasks="tiny_sums", include_path=task, output_path=target)
    assert outcome.code == 0, outcome.err
    for word in ("tiny_sums", "bits_per_byte", "kl_forward", "top1_agreement", "16 rows", str(target)):
        assert word in outcome.out
    found = json.loads(target.read_text())
    assert found["results"]["rows"]["bits_per_byte,none"] == found["bits_per_byte"] > 0
    assert found["results"]["rows"]["kl_forward,none"] == found["kl_forward"] > 0
    assert "acc,none" in found["results"]["tiny_sums"]


def test_a_single_row_has_no_interval_and_the_teacher_itself_no_divergence(kdlib: Command, place: Path, tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "one.jsonl", [conversation("Two?", "Four."), conversation("Three?", "Nine.")])
    models = {"model": place / "teacher", "teacher": place / "teacher"}
    outcome = kdlib("evaluate", **models, dataset_name=rows, output_path=tmp_path, limit=1)
    assert outcome.code == 0 and "1 rows" in outcome.out, outcome.err
    assert json.loads((tmp_path / "one.json").read_text())["kl_forward"] == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({}, "nothing to score: add --tasks TASK"),
        ({"teacher": "teacher"}, "nothing to score"),
        ({"tasks": "x", "teacher": "teacher"}, "add --dataset_name FILE"),
        ({"dataset_name": "rows.jsonl", "teacher": "stranger"}, "different tokenizers"),
        ({"dataset_name": "rows.jsonl", "model": "nowhere/at/all"}, "no tokenizer at nowhere/at/all"),
        ({"tasks": "nothing_like_it", "include_path": "nowhere"}, "'nowhere' is not a directory"),
    ],
    ids=str,
)
def test_evaluate_refuses_in_one_line(
    given: dict[str, str], said: str, kdlib: Command, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(place)
    outcome = kdlib("evaluate", **{"model": "student", **given})
    assert outcome.code == 2 and said in outcome.err and outcome.err.count("\n") == 1


def test_preview_marks_what_is_scored_and_writes_nothing(kdlib: Command, options: dict[str, Any], tmp_path: Path) -> None:
    del options["output_dir"], options["teacher"]
    before = tree(tmp_path)
    outcome = kdlib("distill", **options, preview=2)
    assert outcome.code == 0, outcome.err
    assert outcome.out.count("⟦") == 2 and "⟦It is 2.<|eos|>⟧" in outcome.out and "What is 0 plus two?" in outcome.out
    assert tree(tmp_path) == before


BAD_ROWS = {
    "empty": [],
    "columns": [{"question": "a", "reply": "b"}],
    "silent": [conversation("Two?", "Four."), conversation("Two?")],
    "long": [conversation("Two?" * 200, "Four.")],
}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"dataset_name": "missing.jsonl"}, "dataset missing.jsonl does not exist: check the path"),
        ({"dataset_name": "empty.jsonl"}, "dataset empty.jsonl is empty"),
        ({"dataset_name": "columns.jsonl"}, "has the columns question, reply: rename them to"),
        ({"dataset_name": "silent.jsonl"}, "row 1: no assistant turn"),
        ({"dataset_name": "long.jsonl", "max_length": 64}, "row 0: the prompt alone reaches max_length=64"),
        ({"dataset_name": "broken.jsonl"}, "line 2 is not a JSON row"),
        ({"teacher": "stranger"}, "different tokenizers"),
        ({"teacher": "nowhere/at/all"}, "no model at nowhere/at/all: the directory does not exist"),
        ({"model": "nowhere/at/all"}, "no tokenizer at nowhere/at/all: the directory does not exist"),
        ({"teacher": "null"}, "ForwardKL needs a teacher: give one (--teacher)"),
        ({"teacher": "http://127.0.0.1:9/v1"}, "vllm serve"),
        ({"eval_strategy": "steps"}, "add --eval_dataset_name or --dataset_test_split"),
        ({"tasks": "x", "include_path": "nowhere"}, "'nowhere' is not a directory"),
        ({"config_overrides": "{hidden_size: 8}"}, "add from_scratch true"),
        ({"use_peft": "true", "lora_target_modules": "nothing_like_it"}, "nothing_like_it"),
        ({"objective": "SkewKL", "objective.alpha": 7}, "SkewKL.alpha must be"),
        ({"objective": "own.py:Nothing"}, "own.py has no objective Nothing"),
        ({"learning_rte": 1}, "did you mean learning_rate?"),
        ({"output_dir": "student"}, "is not empty and holds no kdlib run"),
        ({"output_dir": "rows.jsonl"}, "is a file: choose a directory"),
        ({"accelerate_config": "nothing"}, "give ddp, fsdp2, or a YAML file"),
    ],
    ids=str,
)
def test_bad_input_is_one_line_and_nothing_is_written(
    changes: dict[str, Any],
    said: str,
    kdlib: Command,
    place: Path,
    options: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, rows in BAD_ROWS.items():
        write_rows(place / f"{name}.jsonl", rows)
    (place / "broken.jsonl").write_text('{"text": "a"}\n{"text": \n')
    monkeypatch.chdir(place)
    before = tree(place)
    outcome = kdlib("distill", **{**options, **changes})
    assert outcome.code == 2
    assert said in outcome.err and outcome.err.startswith("kdlib distill: ") and outcome.err.count("\n") == 1
    assert not list(tmp_path.iterdir())
    assert tree(place) == before


def test_a_cache_is_not_written_among_other_files(kdlib: Command, place: Path) -> None:
    before = tree(place)
    outcome = kdlib("cache", teacher=place / "teacher", dataset_name=place / "rows.jsonl", output_dir=place / "student")
    assert outcome.code == 2 and "holds no cache: choose another --output_dir" in outcome.err
    assert tree(place) == before


def test_overwriting_starts_anew(kdlib: Command, options: dict[str, Any]) -> None:
    assert kdlib("distill", **options).code == 0
    first = torch.load(options["output_dir"] / "checkpoint-2" / "scheduler.pt", weights_only=True)
    again = kdlib("distill", "--overwrite", **{**options, "learning_rate": 1e-3})
    assert again.code == 0, again.err
    second = torch.load(options["output_dir"] / "checkpoint-2" / "scheduler.pt", weights_only=True)
    assert set(first["base_lrs"]) == {2e-5} and set(second["base_lrs"]) == {1e-3}
    assert len((options["output_dir"] / "command.txt").read_text().splitlines()) == 1
