"""Which rows get a completion, what becomes of them, and what is counted."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from kdlib.data.rollout_rows import prompt_ids
from kdlib.trainers.correction import Correction
from kdlib.trainers.rollouts import RolloutCounts, Rollouts
from kdlib.types import Completion, Positions, SamplingParams, Support, TeacherSignal

PARAMS = SamplingParams(max_tokens=4, stop_ids=(2,))


class Scripted:
    """A sampler that answers a prompt with (its length, its seed mod 7, stop); prompts of length 3 get nothing."""

    def __init__(self) -> None:
        self.asked: list[tuple[list[int], int]] = []

    def generate(self, prompts: Sequence[list[int]], params: SamplingParams, *, seeds: Sequence[int]) -> list[Completion]:
        self.asked += list(zip(prompts, seeds, strict=True))
        return [self._one(prompt, seed, params) for prompt, seed in zip(prompts, seeds, strict=True)]

    def _one(self, prompt: list[int], seed: int, params: SamplingParams) -> Completion:
        if len(prompt) == 3:
            return Completion(ids=[], logp=[], finish="length")
        ids = [len(prompt), 3 + seed % 7, 2][: params.max_tokens]
        return Completion(ids=ids, logp=[-0.5] * len(ids), finish="stop" if ids[-1] == 2 else "length")

    def score(self, sequences: Sequence[list[int]]) -> list[list[float]]:
        raise NotImplementedError

    def load(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        raise NotImplementedError

    def close(self) -> None: ...


def row(sample: int, *, prompt: int, completion: Sequence[int] = (8, 9, 2)) -> dict[str, Any]:
    """A token row whose prompt has ``prompt`` tokens of its own."""
    ids = [10 + sample] * prompt
    return {"input_ids": [*ids, *completion], "labels": [-100] * prompt + list(completion), "sample_id": sample}


def rollouts(**changes: Any) -> Rollouts:
    return Rollouts(**{"sampler": Scripted(), "params": PARAMS, "fraction": 1.0, "seed": 0, "context": 16, **changes})


def test_completions_replace_those_of_the_data_set_and_keep_their_log_probs() -> None:
    made, counts = rollouts()([row(0, prompt=4), row(1, prompt=5)], step=1)
    for found, length in zip(made, (4, 5), strict=True):
        assert found["input_ids"][length] == length and found["input_ids"][-1] == 2
        assert found["labels"] == [-100] * length + found["input_ids"][length:]
        assert found["drawn_logp"][length:] == [-0.5] * 3
    assert counts == RolloutCounts(completions=2, tokens=6, clipped=0)


def test_the_discarded_completion_changes_nothing() -> None:
    one, _ = rollouts()([row(0, prompt=4, completion=[8, 2])], step=3)
    other, _ = rollouts()([row(0, prompt=4, completion=[5, 5, 5, 5, 2])], step=3)
    assert one == other


def test_draws_depend_on_step_generation_and_prompt_but_not_on_neighbours() -> None:
    rows = [{**row(i, prompt=4), "generation": g} for i in range(20) for g in range(2)]
    together, apart = Scripted(), Scripted()
    rollouts(sampler=together)(rows, step=1)
    for one in rows:
        rollouts(sampler=apart)([one], step=1)
    assert together.asked == apart.asked
    assert len({seed for _, seed in together.asked}) == len(rows)
    later = Scripted()
    rollouts(sampler=later)(rows, step=2)
    assert not {seed for _, seed in later.asked} & {seed for _, seed in together.asked}


def test_a_fraction_of_the_rows_is_drawn_the_same_ones_in_any_split() -> None:
    rows = [row(i, prompt=4) for i in range(400)]
    made, counts = rollouts(fraction=0.3)(rows, step=1)
    assert 90 < counts.completions < 150  # 120 expected, 9 the standard deviation
    kept = [found for found, given in zip(made, rows, strict=True) if found == given]
    assert len(kept) == 400 - counts.completions
    halves = rollouts(fraction=0.3)(rows[:200], step=1)[0] + rollouts(fraction=0.3)(rows[200:], step=1)[0]
    assert halves == made


def test_rows_without_a_completion_are_left_unscored_and_counted() -> None:
    rows = [row(0, prompt=3), row(1, prompt=16), row(2, prompt=4)]
    made, counts = rollouts()(rows, step=1)
    assert counts.skipped == {"nothing was generated": 1, "the prompt fills the context": 1}
    assert counts.completions == 1
    assert [set(found["labels"]) == {-100} for found in made] == [True, True, False]
    found = counts.metrics(torch.device("cpu"))
    assert float(found["completions/skipped_ratio"][0]) == 2 and found["completions/skipped_ratio"][1] == 3


def test_rows_that_only_fill_a_batch_are_not_drawn() -> None:
    sampler = Scripted()
    filler = {**row(0, prompt=4), "labels": [-100] * 7, "repeated": True}
    made, counts = rollouts(sampler=sampler)([filler], step=1)
    assert made == [filler] and not sampler.asked and counts.completions == 0


def test_completions_at_the_limit_are_scored_without_a_stop_token_and_counted() -> None:
    made, counts = rollouts(params=SamplingParams(max_tokens=2, stop_ids=(2,)))([row(0, prompt=4)], step=1)
    assert counts.clipped == 1
    assert made[0]["labels"][-1] != 2 and len(made[0]["input_ids"]) == 6


def test_completions_of_the_teacher_have_no_drawing_log_probs() -> None:
    made, _ = rollouts(own=False)([row(0, prompt=4)], step=1)
    assert "drawn_logp" not in made[0]


def teacher_likes(best: list[int], *, sure: float = 0.9) -> Any:
    """A teacher over 16 tokens that puts ``sure`` on best[t] at the t-th position of every row's completion."""

    def score(rows: list[dict[str, Any]]) -> tuple[TeacherSignal, Positions]:
        labels = [[label for label in row["labels"] if label != -100] for row in rows]
        flat = torch.tensor([label for own in labels for label in own])
        p = torch.full((len(flat), 16), (1 - sure) / 15)
        wanted = torch.tensor([best[t] for own in labels for t in range(len(own))])
        p[torch.arange(len(flat)), wanted] = sure
        sequence = torch.tensor([i for i, own in enumerate(labels) for _ in own])
        where = Positions(index=torch.arange(len(flat)), labels=flat, sequence=sequence)
        return TeacherSignal(logits=p.log()), where

    return score


@pytest.mark.parametrize("threshold", [0.05, 1.0])
def test_the_first_wrong_token_becomes_the_teachers_and_the_student_writes_on(threshold: float) -> None:
    sampler = Scripted()
    given = row(0, prompt=4)
    drawn = Completion(ids=[4, 7, 11, 12], logp=[-1.0, -2.0, -3.0, -4.0], finish="length")
    correction = Correction(
        sampler=sampler,
        params=SamplingParams(max_tokens=6, stop_ids=(2,)),
        score=teacher_likes([4, 5, 6, 6]),
        threshold=threshold,
    )
    (made,) = correction([given], [drawn], [42])
    (asked,) = sampler.asked
    assert asked[0] == [*prompt_ids(given), 4, 5], "the student goes on after the teacher's token"
    written = made["input_ids"][4:]
    assert written[:2] == [4, 5] and written[2] == 6 and len(written) <= 6
    logp = made["drawn_logp"][4:]
    assert logp[0] == -1.0 and logp[1] != logp[1] and logp[2] == -0.5, "no student drew the corrected token"
    assert made["labels"][4:] == written


def test_what_the_teacher_agrees_with_stays() -> None:
    sampler = Scripted()
    drawn = Completion(ids=[4, 5, 2], logp=[-1.0] * 3, finish="stop")
    correction = Correction(sampler=sampler, params=PARAMS, score=teacher_likes([4, 5, 2]), threshold=1.0)
    (made,) = correction([row(0, prompt=4)], [drawn], [1])
    assert made["input_ids"][4:] == [4, 5, 2] and not sampler.asked


def test_a_token_outside_the_teachers_top_k_is_wrong() -> None:
    def score(rows: list[dict[str, Any]]) -> tuple[TeacherSignal, Positions]:
        where = Positions(index=torch.arange(2), labels=torch.tensor([4, 9]), sequence=torch.zeros(2, dtype=torch.long))
        ids = torch.tensor([[4, 5], [5, 6]])
        return TeacherSignal(logp=torch.tensor([[0.8, 0.1], [0.8, 0.1]]).log(), ids=ids, support=Support.TOPK), where

    drawn = Completion(ids=[4, 9], logp=[-1.0] * 2, finish="length")
    sampler = Scripted()
    correction = Correction(sampler=sampler, params=PARAMS, score=score, threshold=0.1)
    correction([row(0, prompt=4)], [drawn], [1])
    assert sampler.asked[0][0][-2:] == [4, 5]
