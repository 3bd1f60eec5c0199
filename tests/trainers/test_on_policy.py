"""Training on completions drawn in the step: what is drawn, what is scored, and what may not matter."""

from __future__ import annotations

import json
import logging
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from kdlib.objectives import CrossEntropy, ForwardKL, ReverseKL, SampledReverseKL, Sum
from kdlib.samplers import HFSampler, RolloutConfig
from kdlib.serving import ServerAwayError
from kdlib.teachers import EnsembleTeacher, HFTeacher, RoutedTeacher, SelfTeacher
from kdlib.trainers import DistillationTrainer
from kdlib.trainers.on_policy import WEIGHTS_FILE
from kdlib.types import Positions, Support, TeacherSignal
from tests.tiny import tiny_llama, tiny_tokenizer
from tests.trainers.small import V, cross_entropy, logged, plain_loss, reverse_kl, trainer_of

PROMPTS = [f"{'two plus ' * (1 + i % 3)}{i}" for i in range(16)]
PAIRS = [{"prompt": prompt, "completion": " is four, because the sky is blue."} for prompt in PROMPTS]
ON_POLICY = {"on_policy_fraction": 1.0, "max_completion_length": 6}
GREEDY = {**ON_POLICY, "rollout": RolloutConfig(temperature=0.0)}


def greedy(model: nn.Module, prompt: list[int], *, length: int = 6) -> list[int]:
    """What transformers' own generate says."""
    made = model.generate(  # type: ignore[operator]
        torch.tensor([prompt]),
        max_new_tokens=length,
        do_sample=False,
        pad_token_id=0,
        attention_mask=torch.ones(1, len(prompt)),
    )
    return made[0, len(prompt) :].tolist()


def rolled_out(model: nn.Module, prompts: list[str]) -> list[dict[str, Any]]:
    rows = []
    for prompt in prompts:
        ids = tiny_tokenizer().encode(prompt)
        answer = greedy(model, ids)
        rows.append({"input_ids": ids + answer, "labels": [-100] * len(ids) + answer})
    return rows


def test_the_loss_is_that_of_the_students_own_completions(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, rows=PAIRS[:4], objective=ReverseKL(), config=GREEDY)
    student, teacher = tiny_llama(V), tiny_llama(V, seed=1)
    trainer.train()
    expected = plain_loss(student, teacher, rolled_out(student, PROMPTS[:4]), reverse_kl)
    assert logged(trainer)[0] == pytest.approx(float(expected), rel=1e-5)
    assert logged(trainer, "scored_tokens")[0] == 24
    assert logged(trainer, "completions/mean_length")[0] == 6
    shown = [json.loads(line) for line in (tmp_path / "samples" / "rollouts.jsonl").read_text().splitlines()]
    assert [line["tokens"] for line in shown] == [6, 6]
    drawn = {tiny_tokenizer().decode(row["input_ids"]) for row in rolled_out(student, PROMPTS[:4])}
    assert {line["prompt"] + line["completion"] for line in shown} <= drawn


def test_completions_of_the_teacher_are_sequence_level_distillation(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, rows=PAIRS[:4], objective=CrossEntropy(), config={**GREEDY, "rollout_source": "teacher"})
    student, teacher = tiny_llama(V), tiny_llama(V, seed=1)
    trainer.train()
    expected = plain_loss(student, None, rolled_out(teacher, PROMPTS[:4]), cross_entropy)
    assert logged(trainer)[0] == pytest.approx(float(expected), rel=1e-5)


def test_corrected_completions_take_the_teachers_token_where_the_student_errs(tmp_path: Path) -> None:
    config = {**GREEDY, "rollout_source": "corrected", "correction_threshold": 1.0}
    trainer = trainer_of(tmp_path, rows=PAIRS[:1], objective=CrossEntropy(), config=config)
    student, teacher = tiny_llama(V), tiny_llama(V, seed=1)
    prompt = tiny_tokenizer().encode(PROMPTS[0])
    drawn, wanted = greedy(student, prompt), []
    with torch.no_grad():
        best = teacher(torch.tensor([prompt + drawn])).logits[0, len(prompt) - 1 : -1, :V].argmax(-1).tolist()
    first = next(i for i, (own, said) in enumerate(zip(drawn, best, strict=True)) if own != said)
    wanted = [*drawn[:first], best[first]]
    wanted += greedy(student, prompt + wanted, length=6 - len(wanted)) if len(wanted) < 6 else []
    trainer.train()
    row = {"input_ids": prompt + wanted, "labels": [-100] * len(prompt) + wanted}
    assert logged(trainer)[0] == pytest.approx(float(plain_loss(student, None, [row], cross_entropy)), rel=1e-5)


def trajectories(directory: Path, rows: Any = PAIRS, **config: Any) -> tuple[list[float], list[float]]:
    trainer = trainer_of(directory, rows=rows, objective=ReverseKL(), config={**ON_POLICY, "max_steps": 3, **config})
    trainer.train()
    return logged(trainer), logged(trainer, "grad_norm")


def test_the_discarded_completions_do_not_matter(tmp_path: Path) -> None:
    others = [{"prompt": prompt, "completion": " no" * (1 + i % 5)} for i, prompt in enumerate(PROMPTS)]
    only = [{"prompt": prompt} for prompt in PROMPTS]
    expected = trajectories(tmp_path / "a")
    assert trajectories(tmp_path / "b", rows=others) == expected
    assert trajectories(tmp_path / "c", rows=only) == expected


def test_accumulation_does_not_matter(tmp_path: Path) -> None:
    at_once = trajectories(tmp_path / "a", per_device_train_batch_size=8, on_policy_fraction=0.5)
    split = trajectories(tmp_path / "b", per_device_train_batch_size=2, gradient_accumulation_steps=4, on_policy_fraction=0.5)
    for found, expected in zip(split, at_once, strict=True):
        assert found == pytest.approx(expected, rel=1e-5)


def test_the_size_of_generation_batches_does_not_matter(tmp_path: Path) -> None:
    found, expected = trajectories(tmp_path / "a", generation_batch_size=3), trajectories(tmp_path / "b")
    assert found[0] == pytest.approx(expected[0], rel=1e-5)


def test_a_fraction_mixes_rows_as_they_are_with_rollouts(tmp_path: Path) -> None:
    trainer = trainer_of(
        tmp_path,
        rows=PAIRS,
        objective=Sum(parts=((1.0, ForwardKL()), (0.1, SampledReverseKL()))),  # which reads what was drawn
        config={**GREEDY, "on_policy_fraction": 0.5, "max_steps": 4, "save_strategy": "no"},
    )
    batches: list[Any] = []
    prepare = trainer.prepare
    trainer.prepare = lambda made: batches.extend(made) or prepare(made)  # type: ignore[method-assign, func-returns-value]
    trainer.train()
    lengths = [int((labels != -100).sum()) for batch in batches for labels in batch["labels"]]
    drawn = lengths.count(6)
    assert 2 <= drawn <= 14, "16 coins"
    assert set(lengths) - {6}, "and the others keep their own completion"
    for batch in batches:
        marked = batch["drawn_logp"].isfinite().any(1).tolist() if "drawn_logp" in batch else [False] * len(batch["labels"])
        assert marked == [int((labels != -100).sum()) == 6 for labels in batch["labels"]]


def test_generations_of_a_prompt_stand_together_and_differ(tmp_path: Path) -> None:
    config = {**ON_POLICY, "num_generations": 2, "max_steps": 2}
    trainer = trainer_of(tmp_path, rows=PAIRS, objective=ReverseKL(), config=config)
    batches: list[Any] = []
    prepare = trainer.prepare
    trainer.prepare = lambda made: batches.extend(made) or prepare(made)  # type: ignore[method-assign, func-returns-value]
    trainer.train()
    for batch in batches:
        first, second, third, fourth = batch["sample_id"].tolist()
        assert first == second != third == fourth
        assert batch["input_ids"][0].tolist() != batch["input_ids"][1].tolist()


def test_importance_weights_see_what_was_drawn(tmp_path: Path) -> None:
    """Strictly on-policy the ratio is 1: the sampled objective's value is the mean of log q - log p over the drawn tokens."""
    trainer = trainer_of(tmp_path, rows=PAIRS[:4], objective=SampledReverseKL(), config=GREEDY)
    student, teacher = tiny_llama(V), tiny_llama(V, seed=1)
    trainer.train()

    def k1(p: Any, q: Any, labels: Any) -> Any:
        return (q - p).gather(-1, labels[:, None])[:, 0]

    expected = plain_loss(student, teacher, rolled_out(student, PROMPTS[:4]), k1)
    assert logged(trainer)[0] == pytest.approx(float(expected), rel=1e-5)


def weights(trainer: Any) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters()}


class AwayOnce(HFTeacher):
    """A teacher whose server stays away from its ``after``-th batch on, until it is told to come back."""

    after, calls = 2, 0

    def signal(self, batch: Any, positions: Positions, layers: tuple[int, ...] = ()) -> TeacherSignal:
        type(self).calls += 1
        if type(self).calls > self.after:
            raise ServerAwayError("nobody answers")
        return super().signal(batch, positions, layers)


def test_a_run_without_its_teacher_stops_with_a_checkpoint_and_resumes_to_the_same_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = {**ON_POLICY, "max_steps": 4, "save_strategy": "no"}
    whole = trainer_of(tmp_path / "whole", rows=PAIRS, objective=ReverseKL(), config=config)
    whole.train()
    monkeypatch.setattr("kdlib.trainers.scoring.VLLMTeacher", AwayOnce)
    teacher = AwayOnce(tiny_llama(V, seed=1))
    stopped = trainer_of(tmp_path / "stopped", rows=PAIRS, teacher=teacher, objective=ReverseKL(), config=config)
    with pytest.raises(ServerAwayError):
        stopped.train()
    assert stopped.state.global_step == 2
    AwayOnce.after = 100
    resumed = trainer_of(tmp_path / "stopped", rows=PAIRS, teacher=teacher, objective=ReverseKL(), config=config)
    resumed.train(resume_from_checkpoint=True)
    for name, expected in weights(whole).items():
        assert torch.equal(weights(resumed)[name], expected), name


class Slow(HFTeacher):
    """A teacher that takes longer than the update."""

    def signal(self, batch: Any, positions: Positions, layers: tuple[int, ...] = ()) -> TeacherSignal:
        time.sleep(0.5)
        return super().signal(batch, positions, layers)


@pytest.mark.parametrize("served", [False, True])
def test_the_teachers_seconds_are_not_the_updates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, served: bool) -> None:
    """Whether it is asked within the update, or before it as a served one is."""
    if served:
        monkeypatch.setattr("kdlib.trainers.scoring.VLLMTeacher", Slow)
    trainer = trainer_of(tmp_path, teacher=Slow(tiny_llama(V, seed=1)))
    trainer.train()
    assert logged(trainer, "time/teacher")[0] >= 0.5
    assert logged(trainer, "time/update")[0] > 0


def followed(trainer: DistillationTrainer, monkeypatch: pytest.MonkeyPatch) -> tuple[list[float], list[float]]:
    """Fingerprints of the weights that each step's rollouts were drawn with, and of the student after 0, 1, ... steps."""
    assert trainer.on_policy is not None
    sampler = trainer.on_policy.engine.sampler
    assert isinstance(sampler, HFSampler) and sampler.model is not trainer.model
    used, versions = [], [fingerprint(trainer.model)]
    generate, after = sampler.generate, trainer.after_step

    def watched(*arguments: Any, **keywords: Any) -> Any:
        used.append(fingerprint(sampler.model))
        return generate(*arguments, **keywords)

    def noted() -> None:
        after()
        versions.append(fingerprint(trainer.model))

    monkeypatch.setattr(sampler, "generate", watched)
    monkeypatch.setattr(trainer, "after_step", noted)
    trainer.train()
    trainer.close()
    return used, versions


def fingerprint(model: Any) -> float:
    return float(model.lm_head.weight.double().sum())


def test_rollouts_ahead_use_weights_of_the_step_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Step n is drawn by the student after n - 2 updates (1 and 2 by the one that has none); the log says who waits."""
    trainer = trainer_of(tmp_path, rows=PAIRS, objective=ReverseKL(), config={**GREEDY, "max_staleness": 1, "max_steps": 4})
    used, versions = followed(trainer, monkeypatch)
    assert used == pytest.approx([versions[0], versions[0], versions[1], versions[2]], abs=0)
    assert len(set(versions)) == 5
    assert logged(trainer, "time/wait_rollout") and logged(trainer, "time/wait_update")


REFRESHED = {**ON_POLICY, "rollout_refresh_steps": 3, "max_steps": 7, "save_strategy": "steps", "save_steps": 1}


def test_rollouts_are_drawn_with_the_weights_of_the_last_refresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = trainer_of(tmp_path, rows=PAIRS, objective=ReverseKL(), config={**REFRESHED, "save_strategy": "no"})
    used, versions = followed(trainer, monkeypatch)
    assert used == pytest.approx([versions[i] for i in (0, 0, 0, 3, 3, 3, 6)], abs=0)
    assert len(set(versions)) == 8


@pytest.mark.parametrize("step", [3, 5])
def test_a_run_between_refreshes_resumes_to_the_same_bits(tmp_path: Path, step: int) -> None:
    """At step 3 the weights are renewed next, at step 5 those of step 4 are still to be drawn with."""
    config = {**REFRESHED, "save_total_limit": None}
    whole, resumed = (
        trainer_of(tmp_path / name, rows=PAIRS, objective=ReverseKL(), config=config) for name in ("whole", "resumed")
    )
    whole.train()
    checkpoint = tmp_path / "whole" / f"checkpoint-{step}"
    assert (checkpoint / WEIGHTS_FILE).is_file() == (step == 5)
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert logged(resumed)[-(7 - step) :] == logged(whole)[step:]
    for ours, theirs in zip(resumed.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_alarm_when_most_rollouts_are_cut(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="kdlib"):
        trainer_of(tmp_path, rows=PAIRS, config=GREEDY).train()
    assert "cut at max_completion_length 6" in caplog.text


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"on_policy_fraction": 1.5}, "a share of rows"),
        ({"on_policy_fraction": 0.5, "packing": True}, "packing"),
        ({"num_generations": 2}, "add on_policy_fraction"),
        ({"on_policy_fraction": 1.0, "max_staleness": 1, "rollout_source": "corrected"}, "max_staleness 0"),
        ({"on_policy_fraction": 1.0, "max_staleness": 1, "rollout_refresh_steps": 2}, "use one"),
        ({"on_policy_fraction": 1.0, "rollout_refresh_steps": 2, "rollout_source": "corrected"}, "rollout_refresh_steps 1"),
        ({"on_policy_fraction": 1.0, "rollout_refresh_steps": 0}, "at least 1"),
    ],
)
def test_options_that_do_not_fit_are_refused(tmp_path: Path, config: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        trainer_of(tmp_path, rows=PAIRS, config=config)


def test_prompts_alone_need_rollouts_for_all(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="on_policy_fraction 1"):
        trainer_of(tmp_path, rows=[{"prompt": prompt} for prompt in PROMPTS], config={**ON_POLICY, "on_policy_fraction": 0.5})


def test_a_prompt_that_fills_the_context_is_counted_and_trains_nothing(tmp_path: Path) -> None:
    config = {**GREEDY, "rollout": RolloutConfig(temperature=0.0, max_model_len=8), "max_length": 64}
    rows = [{"prompt": "two " * 12}, {"prompt": "two"}, {"prompt": "is"}, {"prompt": "four"}]
    trainer = trainer_of(tmp_path, rows=rows, config=config)
    trainer.train()
    assert logged(trainer, "completions/skipped_ratio")[0] == 0.25
    assert logged(trainer, "scored_tokens")[0] == 18


class TestSeveralTeachers:
    def test_an_ensemble_of_a_teacher_with_itself_is_that_teacher(self, tmp_path: Path) -> None:
        teacher = tiny_llama(V, seed=1)
        losses = []
        for name, given in (("one", teacher), ("two", EnsembleTeacher([HFTeacher(teacher), HFTeacher(teacher)]))):
            trainer = trainer_of(tmp_path / name, teacher=given, config={"max_steps": 2})
            trainer.train()
            losses.append(logged(trainer))
        assert losses[0] == pytest.approx(losses[1], rel=1e-5)

    def test_rows_choose_their_teacher(self, tmp_path: Path) -> None:
        names = {"a": tiny_llama(V, seed=1), "b": tiny_llama(V, seed=2)}
        rows = [{**row, "teacher": "ab"[i % 2]} for i, row in enumerate(PAIRS[:4])]
        routed = RoutedTeacher({name: HFTeacher(model) for name, model in names.items()})
        trainer = trainer_of(tmp_path, rows=rows, teacher=routed)
        expected, student, count = 0.0, tiny_llama(V), 0
        for row in trainer.train_rows.dataset:  # type: ignore[union-attr]
            n = sum(label != -100 for label in row["labels"])
            p = lambda p, q, labels: (p.exp() * (p - q)).sum(-1)  # noqa: E731
            expected, count = expected + n * float(plain_loss(student, names[row["teacher"]], [row], p)), count + n
        trainer.train()
        assert logged(trainer)[0] == pytest.approx(expected / count, rel=1e-5)

    def test_the_student_with_more_to_read_teaches_itself(self, tmp_path: Path) -> None:
        rows = [{**row, "teacher_prompt": "The answer is four. " + row["prompt"]} for row in PAIRS[:4]]
        trainer = trainer_of(tmp_path, rows=rows, teacher=SelfTeacher(), config={"max_steps": 2})
        trainer.train()
        assert logged(trainer)[0] > 1e-4, "with the same prompt it would be 0"

    def test_an_average_of_the_student_is_resumed_exactly(self, tmp_path: Path) -> None:
        config = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "save_total_limit": None, "learning_rate": 1e-2}
        objective = ForwardKL(temperature=1.0)

        def made(directory: str) -> Any:
            return trainer_of(tmp_path / directory, teacher=SelfTeacher("ema", decay=0.5), objective=objective, config=config)

        whole = made("run")
        whole.train()
        again = made("run")
        again.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
        assert logged(again)[-1] == logged(whole)[-1] > 0
        for name, expected in weights(whole).items():
            assert torch.equal(weights(again)[name], expected), name
        assert Support.FULL in SelfTeacher().provides
