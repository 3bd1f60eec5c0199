"""Whole training runs with real vLLM: as rollout engine in the process and behind HTTP, and as a teacher that is killed."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from kdlib.data.cache import CacheReader
from kdlib.objectives import ForwardKL, ReverseKL, SampledReverseKL
from kdlib.samplers import RolloutConfig, StaleEngineError
from kdlib.serving import ServerAwayError
from kdlib.trainers import DistillationTrainer
from tests.integration.runs import TORCHRUN, completed, values
from tests.tiny import tiny_llama
from tests.trainers.small import V, logged, saved, settings
from tests.vllm.servers import ServedModel

pytestmark = pytest.mark.vllm

ROWS = [{"prompt": f"{'two plus ' * (1 + i % 3)}{i}", "completion": " is four, because the sky is blue."} for i in range(16)]
ENGINE = ("--dtype", "float32", "--enforce-eager", "--max-model-len", "128")
STEPS = {"max_steps": 4, "optim": "sgd", "learning_rate": 0.5}  # Adam would make large steps of differences in the last bit
POOLING = ("--runner", "pooling", "--convert", "embed", "--pooler-config", '{"task":"token_embed","use_activation":false}')


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Heads of 32, which vLLM on CPU wants, and other weights than the student's."""
    model = tiny_llama(V, hidden=128, seed=1, tie_word_embeddings=False)
    return saved(tmp_path_factory.mktemp("models") / "teacher", model)


@pytest.fixture(scope="module")
def teacher_server(teacher: str, serve: Callable[..., ServedModel]) -> ServedModel:
    return serve(teacher, *ENGINE, *POOLING)


def trainer(directory: Path, student: Path, teacher: Any, **config: Any) -> DistillationTrainer:
    return DistillationTrainer(
        str(student),
        teacher,
        objective=config.pop("objective", ForwardKL()),
        args=settings(directory, max_length=96, **{"max_steps": 4, "learning_rate": 1e-2, **config}),
        train_dataset=ROWS,
    )


def trained(directory: Path, student: Path, teacher: Any, **config: Any) -> tuple[list[float], dict[str, torch.Tensor]]:
    made = trainer(directory, student, teacher, **config)
    try:
        made.train()
    finally:
        made.close()
    return logged(made), {name: p.detach().clone() for name, p in made.model.named_parameters()}


def assert_same(made: DistillationTrainer, losses: list[float], weights: dict[str, torch.Tensor]) -> None:
    """Up to what a server's own scheduling changes in the last bits."""
    assert logged(made) == pytest.approx(losses, rel=1e-5)
    for name, parameter in made.model.named_parameters():
        torch.testing.assert_close(parameter.detach(), weights[name], rtol=1e-4, atol=1e-6, msg=name)


def test_rollouts_of_every_engine_train_the_same_student(
    tmp_path: Path, tiny_checkpoint: Path, teacher: str, serve: Callable[..., ServedModel]
) -> None:
    """Greedy, so that engines draw the same: losses agree while the weights, pushed before each step, move far."""
    common = {"on_policy_fraction": 1.0, "max_completion_length": 12, "objective": ReverseKL()}
    expected, _ = trained(tmp_path / "hf", tiny_checkpoint, teacher, **common, rollout=RolloutConfig(temperature=0.0))
    assert max(expected) - min(expected) > 0.1
    server = serve(tiny_checkpoint, *ENGINE, "--logprobs-mode", "processed_logprobs", env={"VLLM_SERVER_DEV_MODE": "1"})
    engines = {
        "vllm": RolloutConfig(engine="vllm", temperature=0.0, max_model_len=128, enforce_eager=True),
        "server": RolloutConfig(
            engine="server", url=server.url, temperature=0.0, transfer="files", transfer_dir=str(tmp_path / "transfer")
        ),
    }
    for name, rollout in engines.items():
        found, _ = trained(tmp_path / name, tiny_checkpoint, teacher, **common, rollout=rollout)
        assert found == pytest.approx(expected, rel=1e-3), name


def test_a_student_with_tied_embeddings_and_an_engine_that_keeps_old_weights(
    tmp_path: Path, teacher: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tied students train the same; an engine to which the weights never come stops the run."""
    student = tmp_path / "tied"
    saved(student, tiny_llama(V, hidden=128, tie_word_embeddings=True))
    common = {"on_policy_fraction": 1.0, "max_completion_length": 8}
    expected, _ = trained(tmp_path / "hf", student, teacher, **common, rollout=RolloutConfig(temperature=0.0))
    rollout = RolloutConfig(engine="vllm", temperature=0.0, max_model_len=128, enforce_eager=True)
    made = trainer(tmp_path / "vllm", student, teacher, **common, rollout=rollout)
    try:
        made.train()
        assert logged(made) == pytest.approx(expected, rel=1e-3)
        assert made.on_policy is not None
        monkeypatch.setattr(made.on_policy.engine.sampler, "load", lambda weights: None)
        torch.nn.init.normal_(next(made.model.parameters()))
        with pytest.raises(StaleEngineError, match="old weights"):
            made.train()
    finally:
        made.close()


def test_a_served_teacher_trains_the_same_student_as_one_in_the_process(
    tmp_path: Path, tiny_checkpoint: Path, teacher: str, teacher_server: ServedModel
) -> None:
    expected, _ = trained(tmp_path / "hf", tiny_checkpoint, teacher)
    found, _ = trained(tmp_path / "served", tiny_checkpoint, teacher_server.url, on_policy_fraction=0.0)
    assert found == pytest.approx(expected, rel=1e-4)
    # greedy: a draw at the border of two tokens would fall to the other one for a rounding error of the teacher's
    mixed = {"on_policy_fraction": 0.5, "max_completion_length": 8, "rollout": RolloutConfig(temperature=0.0)}
    both, _ = trained(tmp_path / "hf2", tiny_checkpoint, teacher, **mixed)
    served, _ = trained(tmp_path / "served2", tiny_checkpoint, teacher_server.url, **mixed)
    assert served == pytest.approx(both, rel=1e-4)


def test_a_teacher_that_is_killed_and_comes_back_changes_nothing(
    tmp_path: Path, tiny_checkpoint: Path, teacher_server: ServedModel
) -> None:
    expected, weights = trained(tmp_path / "whole", tiny_checkpoint, teacher_server.url, **STEPS)
    made = trainer(tmp_path / "hurt", tiny_checkpoint, teacher_server.url, **STEPS)
    after = made.after_step

    def kill_after_two() -> None:
        after()
        if made.state.global_step == 2:
            teacher_server.kill()
            threading.Thread(target=lambda: (time.sleep(3), teacher_server.start())).start()

    made.after_step = kill_after_two  # type: ignore[method-assign]
    made.train()
    assert_same(made, expected, weights)


def test_a_teacher_that_stays_away_leaves_a_checkpoint_that_resumes_to_the_same_result(
    tmp_path: Path, tiny_checkpoint: Path, teacher_server: ServedModel
) -> None:
    expected, weights = trained(tmp_path / "whole", tiny_checkpoint, teacher_server.url, **STEPS)
    made = trainer(tmp_path / "run", tiny_checkpoint, teacher_server.url, **STEPS, teacher_patience=2.0)
    after = made.after_step

    def kill_after_two() -> None:
        after()
        if made.state.global_step == 2:
            teacher_server.kill()

    made.after_step = kill_after_two  # type: ignore[method-assign]
    with pytest.raises(ServerAwayError, match="same command"):
        made.train()
    assert (tmp_path / "run" / "checkpoint-2" / "kdlib_state.json").is_file()
    teacher_server.start()
    teacher_server.wait()
    again = trainer(tmp_path / "run", tiny_checkpoint, teacher_server.url, **STEPS)
    again.train(resume_from_checkpoint=True)
    assert_same(again, expected, weights)


def test_rollouts_ahead_by_an_engine_in_the_process(tmp_path: Path, tiny_checkpoint: Path, teacher: str) -> None:
    rollout = RolloutConfig(engine="vllm", max_model_len=128, enforce_eager=True)
    common = {"on_policy_fraction": 1.0, "max_completion_length": 8, "max_staleness": 1}
    losses, _ = trained(tmp_path, tiny_checkpoint, teacher, **common, rollout=rollout, objective=SampledReverseKL())
    assert len(losses) == 4 and all(math.isfinite(loss) for loss in losses)


def test_two_processes_share_a_rollout_server(
    tmp_path: Path, tiny_checkpoint: Path, teacher: str, serve: Callable[..., ServedModel]
) -> None:
    """One process sends the weights; both draw, and train what one process trains."""
    server = serve(tiny_checkpoint, *ENGINE, "--logprobs-mode", "processed_logprobs", env={"VLLM_SERVER_DEV_MODE": "1"})
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(f'{{"prompt": "two plus {i}"}}\n' for i in range(8)))
    words = ["--model", str(tiny_checkpoint), "--teacher", teacher, "--dataset_name", str(rows), "--max_steps", "3"]
    words += ["--on_policy_fraction", "1", "--max_completion_length", "8", "--rollout.temperature", "0"]
    words += ["--logging_steps", "1", "--save_strategy", "no", "--learning_rate", "1e-3"]
    engine = ["--rollout.engine", "server", "--rollout.url", server.url, "--rollout.transfer", "files"]
    engine += ["--rollout.transfer_dir", str(tmp_path / "transfer"), "--per_device_train_batch_size", "2"]
    expected = completed(tmp_path / "one", [*words, "--per_device_train_batch_size", "4"])
    found = completed(tmp_path / "two", [*words, *engine], launcher=TORCHRUN)
    assert values(found, "loss") == pytest.approx(values(expected, "loss"), rel=1e-3)


def test_the_cache_command_asks_a_server(tmp_path: Path, teacher: str, teacher_server: ServedModel) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    for name, source in (("served", teacher_server.url), ("hf", teacher)):
        command = [sys.executable, "-m", "kdlib", "cache", "--teacher", source, "--dataset_name", str(rows), "--k", "8"]
        done = subprocess.run([*command, "--output_dir", str(tmp_path / name)], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-2000:]
    found, expected = (CacheReader(tmp_path / name, verify=True) for name in ("served", "hf"))
    tokens = np.arange(sum(shard.tokens for shard in expected.index.shards))
    ours, theirs = found.read(tokens), expected.read(tokens)
    same = (ours.ids == theirs.ids).mean()
    assert same > 0.99, "near ties may change places"
    assert np.abs(ours.rest.astype(float) - theirs.rest.astype(float)).max() < 5e-3


def test_the_command_trains_with_an_engine_in_its_process(tmp_path: Path, tiny_checkpoint: Path, teacher: str) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(f'{{"prompt": "two plus {i}"}}\n' for i in range(8)))
    words = ["--model", str(tiny_checkpoint), "--teacher", teacher, "--dataset_name", str(rows), "--max_steps", "2"]
    words += ["--on_policy_fraction", "1", "--max_completion_length", "8", "--rollout.engine", "vllm"]
    words += ["--rollout.max_model_len", "128", "--rollout.enforce_eager", "true", "--logging_steps", "1"]
    output = completed(tmp_path / "run", [*words, "--objective", "ReverseKL"])
    samples = (output / "samples" / "completions.jsonl").read_text().splitlines()
    assert [json.loads(line)["prompt"] for line in samples] == [f"two plus {i}" for i in range(4)]
    assert not (output / "rollout_engine").exists(), "the engine has read it"
    assert values(output, "completions/mean_length") and (output / "final" / "model.safetensors").is_file()
