"""kdlib distill with a golden metric: its warning, its report, and the student it ends with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from tests.cli.conftest import Command, write_rows

HACKING = {
    "teacher": "null",
    "objective": "CrossEntropy",
    "learning_rate": 1e-2,
    "lr_scheduler_type": "constant",
    "max_steps": 24,
    "eval_strategy": "steps",
    "eval_steps": 1,
}


@pytest.fixture
def golden(tmp_path: Path) -> Path:
    return write_rows(tmp_path / "golden.jsonl", [{"text": f"zq{i} xv jk{i % 3} wyq pfg mb vv"} for i in range(12)])


def test_the_alarm_is_in_the_summary_the_metrics_and_the_report(
    kdlib: Command, options: dict[str, Any], place: Path, golden: Path
) -> None:
    given = {**options, **HACKING, "eval_dataset_name": place / "rows.jsonl", "golden_dataset_name": golden}
    outcome = kdlib("distill", **given, golden_stop="true")
    assert outcome.code == 0, outcome.err
    run = options["output_dir"]
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    found = [line for line in lines if "golden/value" in line]
    assert found[-1]["golden/alarm"] == 1.0 and found[-1]["step"] < 24
    assert f"alarm at step {found[-1]['step']}; golden metric" in outcome.out
    page = (run / "report.html").read_text()
    assert "Teacher hacking" in page and "Golden metric against proxy" in page
    best = min(found, key=lambda line: line["golden/value"])["step"]
    kept, final = (load_file(path / "model.safetensors") for path in (run / f"checkpoint-{best}", run / "final"))
    assert all((kept[name] == final[name]).all() for name in final)


def test_golden_rows_that_do_not_fit_are_refused_before_anything_is_written(
    kdlib: Command, options: dict[str, Any], place: Path, tmp_path: Path
) -> None:
    rows = {"eval_strategy": "steps", "eval_dataset_name": place / "rows.jsonl"}
    for given, said in (
        ({"golden_dataset_name": "nowhere.jsonl"}, "dataset nowhere.jsonl does not exist"),
        ({"golden_teacher": place / "stranger"}, "different tokenizers"),
        ({"golden_dataset_name": place / "rows.jsonl", "eval_strategy": "no"}, "measured at every evaluation"),
    ):
        outcome = kdlib("distill", **{**options, **rows, **given})
        assert outcome.code == 2 and said in outcome.err and outcome.err.count("\n") == 1
        assert not options["output_dir"].exists()
