"""kdlib run with a real vLLM engine that writes and scores, ended by SIGKILL once in each of its stages."""

from __future__ import annotations

import json
import signal
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest
import yaml

from tests.cli.test_run import kdlib_run, tiny_recipe
from tests.tiny import tiny_llama, tiny_tokenizer

pytestmark = pytest.mark.vllm
STAGES = ("generate", "sft", "on_policy", "evaluate")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """student/ and teacher/ as vLLM on CPU wants them: heads of 32, embeddings not tied."""
    root, tokenizer = tmp_path_factory.mktemp("models"), tiny_tokenizer()
    for name, seed in (("student", 0), ("teacher", 1)):
        tiny_llama(len(tokenizer), hidden=128, tie_word_embeddings=False, seed=seed).save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
    return root


def recipe_in(root: Path, models: Path) -> Path:
    root.mkdir()
    recipe = tiny_recipe(models, root, engine="vllm")
    content = yaml.safe_load(recipe.read_text())
    content["stages"][-1]["evaluate"]["compare"] = ["base", "sft"]  # an engine each
    recipe.write_text(yaml.safe_dump(content, sort_keys=False))
    return recipe


def results(root: Path) -> dict[str, object]:
    """What the run came to: traces, weights and scores."""
    out = root / "out"
    weights = {name: (out / name / "final" / "model.safetensors").read_bytes() for name in ("sft", "on_policy")}
    traces = [json.loads(line) for line in (out / "generate" / "correct.jsonl").read_text().splitlines()]
    return {**weights, "traces": traces, "scores": json.loads((out / "evaluate" / "comparison.json").read_text())}


def killed_in(recipe: Path, kills: Path, stages: Sequence[str]) -> subprocess.CompletedProcess[str]:
    """The last of several calls of the same command: each before it was ended by SIGKILL in its stage."""
    kills.mkdir()
    for name in stages:
        (kills / name).write_text(str(int(signal.SIGKILL)))
    for name in stages:
        assert kdlib_run(recipe, kills=kills).returncode == -signal.SIGKILL
        assert not (kills / name).exists() and not (recipe.parent / "out" / f"{name}.done.json").exists()
    return kdlib_run(recipe, kills=kills)


def test_killed_while_an_engine_writes_it_goes_on_to_the_report(models: Path, tmp_path: Path) -> None:
    done = killed_in(recipe_in(tmp_path / "killed", models), tmp_path / "kills", STAGES[:1])
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr
    assert "report  " in done.stdout and results(tmp_path / "killed")["traces"]


@pytest.mark.soak
def test_killed_in_each_stage_it_comes_to_the_same_result(models: Path, tmp_path: Path) -> None:
    whole = kdlib_run(recipe_in(tmp_path / "whole", models))
    assert whole.returncode == 0, whole.stdout[-3000:] + whole.stderr
    done = killed_in(recipe_in(tmp_path / "killed", models), tmp_path / "kills", STAGES)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr
    assert results(tmp_path / "killed") == results(tmp_path / "whole")
    assert "report  " in done.stdout
