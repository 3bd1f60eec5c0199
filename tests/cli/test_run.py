"""kdlib run on tiny models: a whole recipe stopped in the middle and continued, done again, changed, and without rows."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.cli.conftest import Command, tree, write_rows

KILLER = Path(__file__).with_name("killer.py")
TRAINING = {"max_steps": 4, "save_steps": 2, "save_strategy": "steps", "logging_steps": 1, "per_device_train_batch_size": 4}


def tiny_recipe(place: Path, root: Path, *, verify: str = "right", engine: str = "hf") -> Path:
    """generate, sft, on_policy and evaluate on tiny models; a completion is right by its length."""
    asks = [[{"role": "user", "content": f"What is {i} plus two?"}] for i in range(8)]
    problems = write_rows(root / "problems.jsonl", [{"prompt": ask, "answer": str(i + 2)} for i, ask in enumerate(asks)])
    rollout = {"engine": engine, **({"max_model_len": 128, "enforce_eager": True} if engine == "vllm" else {})}
    asked = {"verify": f"{KILLER}:{verify}", "max_completion_length": 8, "generation_batch_size": 8}
    backend = {"backend": engine, **({"max_model_len": 128, "enforce_eager": True} if engine == "vllm" else {})}
    recipe = {
        "model": str(place / "student"),
        "teacher": str(place / "teacher"),
        "dataset_name": str(problems),
        "output_dir": str(root / "out"),
        "seed": 1,
        "use_cpu": True,
        "dtype": "float32",
        "stages": [
            {"generate": {**asked, "num_generations": 4, "rows_per_shard": 4, "rollout": rollout}},
            {"distill": {"name": "sft", "objective": f"{KILLER}:Taught", "learning_rate": 1e-3, **TRAINING}},
            {
                "distill": {
                    "name": "on_policy",
                    "objective": f"{KILLER}:Judged",
                    "on_policy_fraction": 1.0,
                    "max_completion_length": 8,
                    **TRAINING,
                }
            },
            {"evaluate": {"problems": str(problems), "n": 2, "compare": ["base", "sft", "teacher"], **asked, **backend}},
        ],
    }
    path = root / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe, sort_keys=False))
    return path


def kdlib_run(recipe: Path, *words: str, kills: Path | None = None) -> subprocess.CompletedProcess[str]:
    """``kdlib run`` in a process of its own; ``kills``: see killer.py."""
    environment = {**os.environ, **({} if kills is None else {"KDLIB_TEST_KILLS": str(kills)})}
    call = [sys.executable, "-m", "kdlib", "run", str(recipe), *words]
    return subprocess.run(call, env=environment, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def finished(place: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """A recipe stopped by SIGTERM in its second stage, and continued."""
    root = tmp_path_factory.mktemp("run")
    recipe, kills = tiny_recipe(place, root), root / "kills"
    kills.mkdir()
    (kills / "sft").write_text(str(int(signal.SIGTERM)))
    stopped = kdlib_run(recipe, kills=kills)
    held = {path.name for path in (root / "out").iterdir()}
    yield {"recipe": recipe, "stopped": stopped, "held": held, "done": kdlib_run(recipe), "out": root / "out"}


@pytest.mark.slow
def test_sigterm_reaches_the_stage_and_the_same_command_continues(finished: dict[str, Any]) -> None:
    stopped, done, out = finished["stopped"], finished["done"], finished["out"]
    assert stopped.returncode == 128 + signal.SIGTERM, stopped.stderr
    assert "the same command resumes" in stopped.stdout  # the stage's own words
    assert "stage sft ended with exit code 143" in stopped.stderr and "the same command continues" in stopped.stderr
    assert "generate.done.json" in finished["held"] and "sft.done.json" not in finished["held"]
    assert done.returncode == 0, done.stderr + done.stdout
    assert "resuming from" in done.stdout and "kdlib generate --config" not in done.stdout  # generate is not done again
    names = ("generate", "sft", "on_policy", "evaluate")
    assert all((out / f"{name}.done.json").is_file() and (out / f"{name}.log").is_file() for name in names)
    assert json.loads((out / "sft.done.json").read_text())["seconds"] > 0
    assert "resuming from" in (out / "sft.log").read_text()


@pytest.mark.slow
def test_the_report_shows_every_stage_and_its_gain(finished: dict[str, Any]) -> None:
    out, said = finished["out"], finished["done"].stdout
    comparison = json.loads((out / "evaluate" / "comparison.json").read_text())
    assert comparison["models"] == ["teacher", "base", "sft", "on_policy"]
    assert comparison["rows"][0]["gains"]["sft"]["over"] == "base" and "report  " in said and "next    " in said
    html = (out / "report.html").read_text()
    assert all(f">{name}<" in html for name in ("generate", "sft", "on_policy", "evaluate")) and "over sft" in html
    assert '<a href="generate/report.html">' in html and "avg@2" in html
    assert (out / "recipe.yaml").read_text() == finished["recipe"].read_text()
    assert len((out / "command.txt").read_text().splitlines()) == 2


@pytest.mark.slow
def test_again_it_shows_what_is_there_and_changed_it_is_refused(finished: dict[str, Any], kdlib: Command) -> None:
    stages = {"generate", "sft", "on_policy", "evaluate"}
    before = {path: content for path, content in tree(finished["out"]).items() if Path(path).parts[-2] in stages}
    again = kdlib("run", str(finished["recipe"]))
    assert again.code == 0 and "stage sft:" not in again.out and "report  " in again.out
    refused = kdlib("run", str(finished["recipe"]), seed=2)
    assert refused.code == 2 and refused.err.count("\n") == 1
    assert "stage generate" in refused.err and "seed: 1 -> 2" in refused.err and "--overwrite generate" in refused.err
    unknown = kdlib("run", str(finished["recipe"]), only="on_polcy")
    assert unknown.code == 2 and "there is no stage on_polcy: did you mean on_policy?" in unknown.err
    after = tree(finished["out"])
    assert {path: after[path] for path in before} == before


@pytest.mark.slow
def test_no_right_answer_stops_before_the_stage_that_would_read_it(place: Path, tmp_path: Path) -> None:
    recipe = tiny_recipe(place, tmp_path, verify="never")
    alone = kdlib_run(recipe, "--only", "sft")
    assert alone.returncode == 2 and "stage sft reads stage generate, which is not done" in alone.stderr
    done = kdlib_run(recipe)
    assert done.returncode == 2 and done.stderr.splitlines()[-1].startswith("kdlib run: stage sft has nothing to read")
    assert (tmp_path / "out" / "generate.done.json").is_file() and not (tmp_path / "out" / "sft").exists()


def test_without_a_recipe_it_says_how(kdlib: Command) -> None:
    assert kdlib("run").code == 2 and "recipe missing: add --recipe RECIPE" in kdlib("run").err
    assert "takes one recipe" in kdlib("run", "a.yaml", "b.yaml").err
