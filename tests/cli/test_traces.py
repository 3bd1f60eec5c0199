"""From ``kdlib generate`` to ``kdlib distill --objective REDI``, as users type it; the one line for mistakes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import AutoModelForCausalLM

from tests.cli.conftest import Command, write_rows

# Right where the first token's number is even: prompts then have both kinds of answers.
VERIFIER = """
def even(completion, row):
    return None if row["answer"] == "abstain" else len(completion) % 2 == 0
"""


@pytest.fixture(scope="module")
def asked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("asked")
    rows = [{"question": f"What is {i} plus two?", "answer": "abstain" if i == 4 else str(i)} for i in range(8)]
    write_rows(root / "rows.jsonl", rows)
    (root / "own.py").write_text(VERIFIER)
    return root


@pytest.fixture
def traces(kdlib: Command, place: Path, asked: Path, tmp_path: Path) -> Path:
    """What ``kdlib generate`` leaves."""
    done = kdlib(
        "generate",
        model=place / "teacher",
        dataset_name=asked / "rows.jsonl",
        output_dir=tmp_path / "traces",
        verify=f"{asked / 'own.py'}:even",
        num_generations=4,
        max_completion_length=10,
        device="cpu",
    )
    assert done.code == 0, done.err
    return tmp_path / "traces"


@pytest.fixture
def options(place: Path, traces: Path, tmp_path: Path) -> dict[str, Any]:
    return {
        "model": place / "student",
        "dataset_name": traces,
        "objective": "REDI",
        "output_dir": tmp_path / "run",
        "use_cpu": "true",
        "per_device_train_batch_size": 2,
        "max_steps": 2,
        "logging_steps": 1,
    }


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_difficulty_is_the_share_of_wrong_completions(traces: Path) -> None:
    found = [trace for path in sorted(traces.glob("shard-*.jsonl")) for trace in lines(path)]
    judged = lines(traces / "correct.jsonl") + lines(traces / "incorrect.jsonl")
    shares = {}
    for prompt in {trace["prompt_id"] for trace in judged}:
        own = [(trace["correct"], trace["count"]) for trace in found if trace["prompt_id"] == prompt]
        shares[prompt] = sum(n for right, n in own if not right) / sum(n for _, n in own)
    assert len(shares) == 7 and len(set(shares.values())) > 1
    assert all(trace["difficulty"] == pytest.approx(shares[trace["prompt_id"]]) for trace in judged)
    report = json.loads((traces / "report.json").read_text())["difficulty"]
    values = list(shares.values())
    assert report["prompts"] == 7 and report["mean"] == pytest.approx(sum(values) / 7)
    kinds = (sum(v == 0 for v in values), sum(0 < v < 1 for v in values), sum(v == 1 for v in values))
    assert (report["all_right"], report["both"], report["all_wrong"]) == kinds
    assert sum(one["prompts"] for one in report["histogram"]) == 7
    page = (traces / "report.html").read_text()
    assert "Difficulty" in page and "wrong to right length" in page


def test_a_directory_of_traces_trains_and_the_same_command_shows_it(kdlib: Command, options: dict[str, Any]) -> None:
    done = kdlib("distill", **options, curriculum="difficulty", max_pairs=2, eval_dataset_name=options["dataset_name"])
    assert done.code == 0, done.err
    run = options["output_dir"]
    AutoModelForCausalLM.from_pretrained(run / "final")
    logged = [line for line in lines(run / "metrics.jsonl") if "grad_norm" in line]
    assert [line["step"] for line in logged] == [1, 2]
    for line in logged:
        assert line["loss"] == pytest.approx(-line["rewards/chosen"] + 0.8 * line["rewards/rejected"], rel=1e-4)
        assert "curriculum/open" in line
    assert yaml.safe_load((run / "config.yaml").read_text())["objective"] == {"REDI": {"alpha": 0.8, "positive_weight": 1.0}}
    assert "REDI(" in (run / "final" / "README.md").read_text()
    assert any("eval_rewards/accuracies" in line for line in lines(run / "metrics.jsonl")), "pairs again"
    again = kdlib("distill", **options, curriculum="difficulty", max_pairs=2, eval_dataset_name=options["dataset_name"])
    assert again.code == 0 and "finished" in again.err


def test_the_preview_shows_both_answers(kdlib: Command, options: dict[str, Any]) -> None:
    done = kdlib("distill", **options, preview=1)
    assert done.code == 0, done.err
    assert done.out.index("Right answers, made likelier") < done.out.index("Wrong answers, made less likely")


def test_the_example_is_a_configuration(kdlib: Command) -> None:
    done = kdlib("distill", "--print_config", config=Path(__file__).parents[2] / "examples" / "redi.yaml")
    assert done.code == 0, done.err
    assert yaml.safe_load(done.out)["objective"] == {"REDI": {"alpha": 0.8, "positive_weight": 1.0}}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"objective.alpha": -1}, "REDI needs positive_weight and alpha of 0 or more"),
        ({"unpaired": "keep"}, "unpaired"),
        ({"packing": "true"}, "packing puts rows together, which would take pairs apart"),
        ({"curriculum": "hardness"}, "the rows have no column hardness"),
    ],
)
def test_mistakes_are_one_line(kdlib: Command, options: dict[str, Any], given: dict[str, Any], message: str) -> None:
    done = kdlib("distill", **options, **given)
    assert done.code == 2 and message in done.err
    assert not (options["output_dir"] / "config.yaml").exists()


def test_rows_that_hold_no_pairs_are_told_what_to_do(kdlib: Command, options: dict[str, Any], place: Path) -> None:
    done = kdlib("distill", **{**options, "dataset_name": place / "rows.jsonl"})
    assert done.code == 2 and "pairs are a directory of kdlib generate --verify" in done.err
