"""The golden metric of a running training: what it is, when it warns and stops, and that a resumed run says the same."""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file

from kdlib.eval.bpb import bits_per_byte
from kdlib.eval.divergence import kl_to_teacher
from kdlib.objectives import CrossEntropy
from kdlib.trainers import DistillationConfig, DistillationTrainer
from kdlib.trainers.golden import GoldenCallback, GoldenTeacher, GoldenText, golden_callbacks
from tests.tiny import tiny_llama, tiny_tokenizer
from tests.trainers.small import ROWS, V, saved, settings, trainer_of

FOREIGN = [{"text": f"zq{i} xv jk{i % 3} wyq pfg mb vv"} for i in range(12)]  # what a student of ROWS unlearns
EVERY = {"eval_strategy": "steps", "eval_steps": 1, "learning_rate": 1e-2, "lr_scheduler_type": "constant"}


def written(path: Path, rows: list[dict[str, str]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def watched(directory: Path, golden: list[dict[str, str]], **config: Any) -> DistillationTrainer:
    """A student of ROWS, with a golden metric on other rows."""
    options = {**EVERY, "max_steps": 12, "golden_dataset_name": written(directory / "golden.jsonl", golden), **config}
    student = saved(directory / "student", tiny_llama(V))
    run = directory / "run"
    callbacks = golden_callbacks(settings(run, **options), student, evaluation_rows=None)
    given = {"model": student, "teacher": None, "objective": CrossEntropy(), "eval_dataset": ROWS[:3], "callbacks": callbacks}
    return trainer_of(run, config=options, **given)


def golden_lines(run: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "golden/value" in line]


def test_a_run_that_unlearns_the_golden_text_warns_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trainer = watched(tmp_path, FOREIGN)
    with caplog.at_level(logging.WARNING, logger="kdlib.golden"):
        trainer.train()
    lines = golden_lines(tmp_path / "run")
    assert [line["step"] for line in lines] == list(range(1, 13))
    assert lines[-1]["golden/alarm"] == 1.0 and lines[-1]["golden/rise_low"] > 0 > lines[-1]["golden/loss_slope_high"]
    warnings = [record.getMessage() for record in caplog.records if record.name == "kdlib.golden"]
    assert len(warnings) == 1 and warnings[0].startswith("teacher hacking: the training loss still falls")
    assert "nats per byte" in warnings[0] and "\n" not in warnings[0]


def test_a_run_that_learns_it_is_quiet(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trainer = watched(tmp_path, ROWS[:12])
    with caplog.at_level(logging.WARNING, logger="kdlib.golden"):
        trainer.train()
    assert all(line["golden/alarm"] == 0.0 for line in golden_lines(tmp_path / "run"))
    assert not [record for record in caplog.records if record.name == "kdlib.golden"]


def test_golden_stop_ends_with_the_best_student(tmp_path: Path) -> None:
    trainer = watched(tmp_path, FOREIGN, golden_stop=True, save_total_limit=1)
    trainer.train()
    run = tmp_path / "run"
    lines = golden_lines(run)
    best = min(lines, key=lambda line: line["golden/value"])["step"]
    assert trainer.state.global_step == lines[-1]["step"] < 12 and lines[-1]["golden/alarm"] == 1.0
    assert Path(str(trainer.state.best_model_checkpoint)) == run / f"checkpoint-{best}" and best < lines[-1]["step"]
    kept = load_file(run / f"checkpoint-{best}" / "model.safetensors")
    for name, parameter in trainer.model.named_parameters():
        if name in kept:
            assert torch.equal(parameter.detach(), kept[name]), name


def test_a_resumed_run_says_what_the_whole_one_said(tmp_path: Path) -> None:
    saving = {"save_strategy": "steps", "save_steps": 4, "save_total_limit": 9}
    watched(tmp_path, FOREIGN, **saving).train()
    run = tmp_path / "run"
    whole, looks = golden_lines(run), (run / "eval" / "golden.jsonl").read_bytes()
    watched(tmp_path, FOREIGN, **saving).train(resume_from_checkpoint=str(run / "checkpoint-4"))
    assert golden_lines(run) == whole
    assert (run / "eval" / "golden.jsonl").read_bytes() == looks


def test_golden_text_is_bits_per_byte_in_nats(tmp_path: Path) -> None:
    model, tokenizer, rows = tiny_llama(V), tiny_tokenizer(), Dataset.from_list(FOREIGN)
    expected = bits_per_byte(model, rows, tokenizer=tokenizer, max_length=64)
    prepared = trainer_of(tmp_path, eval_dataset=FOREIGN, config={"max_length": 64}).eval_rows
    assert prepared is not None
    golden = GoldenText(rows=prepared.dataset, tokenizer=tokenizer, batch_size=5)
    assert sum(golden.nats(model)) / sum(golden.per) == pytest.approx(expected.bits_per_byte * math.log(2), rel=1e-6)


def test_a_golden_teacher_is_kl_to_it(tmp_path: Path) -> None:
    student, tokenizer = tiny_llama(V), tiny_tokenizer()
    path = saved(tmp_path / "golden", tiny_llama(V, seed=5))
    args = settings(tmp_path / "run", **EVERY, golden_teacher=path, max_length=64)
    (callback,) = golden_callbacks(args, path, evaluation_rows=Dataset.from_list(ROWS[:6]))
    assert isinstance(callback, GoldenCallback) and isinstance(callback.golden, GoldenTeacher)
    expected = kl_to_teacher(student, tiny_llama(V, seed=5), Dataset.from_list(ROWS[:6]), tokenizer=tokenizer, max_length=64)
    found = sum(callback.golden.nats(student)) / sum(callback.golden.per)
    assert found == pytest.approx(expected["kl_forward"], rel=1e-5)


def test_golden_text_in_another_tokenizer_is_fine_and_a_golden_teacher_is_not(tmp_path: Path) -> None:
    student = saved(tmp_path / "student", tiny_llama(V))
    stranger = saved(tmp_path / "stranger", tiny_llama(340), tiny_tokenizer(vocab_size=340))
    args = settings(tmp_path / "run", **EVERY, golden_teacher=stranger)
    with pytest.raises(ValueError, match="golden_teacher have different tokenizers"):
        golden_callbacks(args, student, evaluation_rows=Dataset.from_list(ROWS[:6]))


def test_both_ways_models_are_refused(tmp_path: Path) -> None:
    model = tiny_llama(V)
    model.config.is_causal = False
    callback = GoldenCallback(GoldenText(rows=Dataset.from_list([]), tokenizer=tiny_tokenizer(), batch_size=1), stop=False)
    with pytest.raises(ValueError, match="reads both ways"):
        callback.on_init_end(settings(tmp_path), None, None, model=model)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"golden_dataset_name": "x", "golden_teacher": "y", **EVERY}, "two golden metrics: leave one out"),
        ({"golden_stop": True}, "golden_stop needs a golden metric: add --golden_dataset_name"),
        ({"golden_dataset_name": "x"}, "measured at every evaluation: add --eval_strategy steps"),
    ],
    ids=str,
)
def test_options_that_do_not_go_together_are_refused(options: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=said):
        DistillationConfig(output_dir=str(tmp_path), use_cpu=True, **options)
