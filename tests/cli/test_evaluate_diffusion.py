"""kdlib evaluate diffusion on checkpoints: what it prints and writes, that it continues, and what it refuses in one line."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from kdlib.cli.evaluation.diffusion import DiffusionArguments, SweepArguments
from kdlib.cli.help import docs, shown_default
from kdlib.data.arithmetic import make_problems
from kdlib.data.arithmetic_models import END, make_tokenizer
from kdlib.diffusion import DiffusionSpec, as_diffusion, with_mask_token
from kdlib.eval.arithmetic_task import TASK, arithmetic_task
from tests.cli.conftest import Command, tree, write_rows
from tests.tiny import tiny_llama

STRATEGIES = "[{ConfidenceThreshold: {threshold: [0.05, 0.9]}}, {LowConfidence: {steps: 6}}]"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """model/, base/, causal/, the arithmetic task with its rows, and rows.jsonl for bits per byte."""
    root = tmp_path_factory.mktemp("models")
    tokenizer = make_tokenizer()
    mask, end = with_mask_token(tokenizer, "<|mask|>"), tokenizer.convert_tokens_to_ids(END)
    for name, seed in (("model", 0), ("base", 1), ("causal", 2)):
        made = tiny_llama(len(tokenizer), seed=seed, eos_token_id=end)
        if name != "causal":
            as_diffusion(made, DiffusionSpec(mask_token_id=mask, eos_token_id=end))
        made.save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
    problems = make_problems(3, seed=0, split="test", slips=0.0)
    write_rows(root / "test.jsonl", problems)
    (root / f"{TASK}.yaml").write_text(yaml.safe_dump(arithmetic_task(root / "test.jsonl")))
    write_rows(root / "rows.jsonl", [{"prompt": row["question"], "completion": " It is 4."} for row in problems])
    return root


def options(models: Path, **more: Any) -> dict[str, Any]:
    given = {
        "model": models / "model",
        "tasks": TASK,
        "include_path": models,
        "strategies": STRATEGIES,
        "gen_length": 6,
        "block_length": 3,
        "batch_size": 2,
        "device": "cpu",
    }
    return {**given, **more}


def test_both_models_on_a_task_prompts_and_a_text(kdlib: Command, models: Path, tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    more = {"base": models / "base", "dataset_name": models / "rows.jsonl", "mc_samples": 4, "output_path": tmp_path / "out"}
    asked = options(models, prompts=models / "test.jsonl", prompt_limit=2, **more)
    outcome = kdlib("evaluate", "diffusion", **asked)
    assert outcome.code == 0, outcome.err
    for said in (
        f"{TASK}, 3 answers, gen_length 6",
        "prompts, 2 answers",
        "ConfidenceThreshold(threshold=0.9)",
        "AUP",
        "bits per byte",
    ):
        assert said in outcome.out, said
    content = json.loads((tmp_path / "out" / "diffusion.json").read_text())
    assert [point["model"] for point in content["points"]] == ["base"] * 6 + ["model"] * 6
    assert len(content["aup"]) == 2 and content["bits_per_byte_bound"]["model"]["mc_samples"] == 4
    for point in content["points"]:
        assert point["answers"] == (3 if point["task"] == TASK else 2)
        assert point["tokens_per_forward"]["value"] == point["tokens"] / point["forwards"]
        assert bool(point["scores"]) == (point["task"] == TASK)
        if "LowConfidence" in point["strategy"]:
            assert point["forwards"] <= 6 * point["answers"]
    assert "accuracy" in content["counted"] and content["gen_length"] == 6
    page = (tmp_path / "out" / "diffusion.html").read_text()
    assert page.count("<svg") == 1 and "Accuracy over tokens per forward" in page and "What is counted" in page
    assert not re.search(r"<(script|link|img)|(src|href)=.(?!#)", page)
    before = tree(tmp_path / "out")
    assert kdlib("evaluate", "diffusion", **asked).code == 0
    assert tree(tmp_path / "out") == before
    changed = kdlib("evaluate", "diffusion", **{**asked, "gen_length": 4, "limit": 2})
    assert changed.code == 2 and "gen_length: 6 -> 4; limit: null -> 2" in changed.err and changed.err.count("\n") == 1


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"model": "causal"}, "is no diffusion language model that kdlib knows"),
        ({"strategies": "[Guess]"}, "no strategy Guess: choose LowConfidence"),
        ({"strategies": "[{ConfidenceThreshold: {threshold: [0.5, 1.5]}}]"}, "1.5"),
        ({"strategies": "[{Factor: {size: 2}}]"}, "Factor has no option size"),
        ({"preset": "llama"}, "no preset llama: choose llada, dream"),
        ({"cache": "all"}, "cache 'all': choose"),
        ({"batch_size": 0}, "batch_size must be at least 1, not 0"),
    ],
    ids=["causal", "strategy", "threshold", "field", "preset", "cache", "batch"],
)
def test_mistakes_are_one_line(kdlib: Command, models: Path, more: dict[str, Any], said: str) -> None:
    given = {key: models / value if key == "model" else value for key, value in more.items()}
    without = {key: value for key, value in options(models, **given).items() if key not in ("tasks", "include_path")}
    outcome = kdlib("evaluate", "diffusion", **without, prompts=models / "test.jsonl")
    assert outcome.code == 2 and said in outcome.err and outcome.err.count("\n") == 1, outcome.err


def test_nothing_to_measure(kdlib: Command, models: Path) -> None:
    outcome = kdlib("evaluate", "diffusion", model=models / "model")
    assert outcome.code == 2 and "add --tasks TASK, --prompts FILE" in outcome.err


def test_evaluate_takes_the_bound_of_a_diffusion_model(kdlib: Command, models: Path) -> None:
    outcome = kdlib("evaluate", model=models / "model", dataset_name=models / "rows.jsonl", device="cpu")
    assert outcome.code == 0 and "bits_per_byte_bound" in outcome.out, outcome.err


def test_options_are_on_their_page() -> None:
    page = (Path(__file__).parents[2] / "docs" / "dllm_evaluation.md").read_text(encoding="utf-8")
    found = dict(re.findall(r"^\| `(\w+)` \| (.*?) ?\| .+ \|$", page, flags=re.MULTILINE))
    assert found == {key: shown_default(part, key) for part in (DiffusionArguments, SweepArguments) for key in docs(part)}


def test_help_teaches(kdlib: Command) -> None:
    out = kdlib("evaluate", "diffusion", "--help").out
    for said in ("--model", "--base", "--strategies", "--tasks", "--gen_length", "--output_path", "AUP"):
        assert said in out, said
