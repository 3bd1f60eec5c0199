"""States that the student itself makes during training, against iterations of one block at a time."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from torch import nn

from kdlib.samplers import RolloutConfig
from kdlib.trainers import JacobiConfig, JacobiTrainer
from tests.tiny import tiny_tokenizer
from tests.trainers.jacobi_plain import N, Trajectory, plain_ar, plain_consistency
from tests.trainers.jacobi_steps import (
    NOISIEST,
    PLAIN,
    ROWS,
    assert_step,
    jacobi_trainer,
    noisiest,
    one_step,
)
from tests.trainers.small import Gradients, V, Weights, assert_same, double, forward_kl, logged, plain_gradients, settings_of


@torch.no_grad()
def states_of(model: nn.Module, prefix: list[int], state: list[int]) -> list[list[int]]:
    """Jacobi iterations of one block after ``prefix``, until it no longer changes."""
    states = [state]
    while True:
        choice = model(input_ids=torch.tensor([prefix + states[-1]])).logits[0, :, :V].argmax(-1).tolist()
        following = [state[0], *choice[len(prefix) : -1]]
        if following == states[-1]:
            return states
        states.append(following)


def iterated(model: nn.Module, prompt: list[int], completion: list[int]) -> Trajectory:
    """All blocks from copies of the prompt on."""
    blocks = {}
    for number, start in enumerate(range(0, len(completion), N)):
        block = completion[start : start + N]
        guess = [block[0], *(prompt[p % len(prompt)] for p in range(start + 1, start + len(block)))]
        blocks[number] = states_of(model, prompt + completion[:start], guess)
    return Trajectory(prompt, completion, blocks, [])


def test_states_of_the_student_on_a_given_text(tmp_path: Path) -> None:
    """The text is none that it would write, so that its states do not end in it; they are those of each step's weights."""
    rows = [{key: row.row()[key] for key in ("input_ids", "labels", "sample_id")} for row in ROWS]
    weights, gradients = Weights(), Gradients()
    config = {**NOISIEST, "max_steps": 2, "learning_rate": 0.02, "lr_scheduler_type": "constant"}
    trainer = jacobi_trainer(tmp_path, Dataset.from_list(rows), config=config, callbacks=[weights, gradients])
    assert trainer.state_source == "student"
    trainer.train()
    for step in range(2):
        student = double()
        student.load_state_dict(weights.steps[step])
        own = [iterated(student, row.prompt, row.completion) for row in ROWS]
        consistency = plain_consistency(student, own, forward_kl, pick=noisiest)
        expected = consistency + plain_ar(student, own)
        assert logged(trainer)[step] == pytest.approx(expected.item(), rel=1e-6)
        assert_same(gradients.steps[step], plain_gradients(student, expected))


PROMPTS = [f"{'two plus ' * (1 + i % 3)}{i}" for i in range(4)]


def test_texts_of_the_student_are_renewed_with_their_states(tmp_path: Path) -> None:
    """on_policy_fraction 1 at temperature 0: the text is the student's own greedy one, where its states end."""
    tokenizer, length = tiny_tokenizer(), 10
    config = {"on_policy_fraction": 1.0, "max_completion_length": length, "rollout": RolloutConfig(temperature=0.0)}
    prompts = [{"prompt": prompt} for prompt in PROMPTS]
    weights, gradients = Weights(), Gradients()
    options = {**config, **NOISIEST, "max_steps": 2, "learning_rate": 0.01, "lr_scheduler_type": "constant"}
    trainer = JacobiTrainer(
        double(),
        args=settings_of(JacobiConfig, tmp_path, **PLAIN, **options),
        train_dataset=prompts,
        processing_class=tokenizer,
        callbacks=[weights, gradients],
    )
    assert trainer.state_source == "student"
    trainer.train()
    drawn = []
    for step in range(2):
        student = double()
        student.load_state_dict(weights.steps[step])
        own = []
        for prompt in (tokenizer.encode(text) for text in PROMPTS):
            ids = torch.tensor([prompt])
            how = {"max_new_tokens": length, "do_sample": False, "pad_token_id": 0}
            text = student.generate(ids, attention_mask=torch.ones_like(ids), **how)[0, len(prompt) :].tolist()
            own.append(iterated(student, prompt, text))
            assert [states[-1] for states in own[-1].blocks.values()] == [own[-1].text(b) for b in own[-1].blocks]
        consistency = plain_consistency(student, own, forward_kl, pick=noisiest)
        expected = consistency + plain_ar(student, own)
        assert logged(trainer)[step] == pytest.approx(expected.item(), rel=1e-6)
        assert_same(gradients.steps[step], plain_gradients(student, expected))
        drawn.append([row.completion for row in own])
    assert drawn[0] != drawn[1], "the student must have changed to tell anything"


def test_of_a_conversation_the_last_answer_has_states_and_all_answers_are_learned(tmp_path: Path) -> None:
    turns = [(5, False), (3, True), (2, False), (6, True), (2, False)]
    rng = random.Random(0)
    flags = [scored for count, scored in turns for _ in range(count)]
    ids = [rng.randrange(3, V) for _ in flags]
    labels = [token if scored else -100 for token, scored in zip(ids, flags, strict=True)]
    rows = Dataset.from_list([{"input_ids": ids, "labels": labels, "sample_id": 1}])
    trainer, found = one_step(tmp_path, rows, config={"state_source": "student", **NOISIEST})
    student = double()
    last = iterated(student, ids[:10], ids[10:16])
    consistency = plain_consistency(student, [last], forward_kl, pick=noisiest)
    scored = torch.tensor(labels)[1:] != -100
    said = student(torch.tensor([ids])).logits[0, :-1][scored].log_softmax(-1)
    ar = -said.gather(1, torch.tensor(ids)[1:][scored][:, None]).mean()
    assert_step(trainer, found, student, consistency=consistency, ar=ar)
