"""Diffusion training against loops over single rows and blocks, in float64."""

from __future__ import annotations

import copy
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from kdlib.objectives import ForwardKL
from kdlib.objectives.diffusion import (
    CertaintyForcing,
    DiffusionForcing,
    MaskConsistency,
    MaskedELBO,
    SharpenedKL,
    StepHalving,
)
from kdlib.teachers import SelfTeacher
from tests.tiny import tiny_llama, tiny_tokenizer
from tests.trainers.diffusion_plain import EOS, SIZE, Masked, Plain, Reader, Terms, Text, mean, text
from tests.trainers.diffusion_steps import (
    BLOCKS,
    MASK_TOKEN,
    ROWS,
    assert_step,
    diffusion_trainer,
    dllm,
    masked_of,
    masked_rows,
    one_step,
    uniform_of,
)
from tests.trainers.small import Gradients, V, forward_kl, lora, reverse_kl

# How a model reads, as the spec and the options say it, and as the plain computation does.
READINGS: dict[str, tuple[dict[str, Any], dict[str, Any], Reader]] = {
    "full": ({}, {}, Reader()),
    "shift": ({"shift": True}, {}, Reader(shift=True)),
    "noisy": (BLOCKS, {}, Reader("noisy")),
    "noisy-shift": ({**BLOCKS, "shift": True}, {}, Reader("noisy", shift=True)),
    "clean": (BLOCKS, {"context": "clean"}, Reader("clean")),
    "clean-shift": ({**BLOCKS, "shift": True}, {"context": "clean"}, Reader("clean", shift=True)),
    "sequence": ({**BLOCKS, "blocks_from": "sequence"}, {}, Reader("noisy", sequence=True)),
    "sequence-clean": ({**BLOCKS, "blocks_from": "sequence"}, {"context": "clean"}, Reader("clean", sequence=True)),
    "sequence-clean-shift": (
        {**BLOCKS, "blocks_from": "sequence", "shift": True},
        {"context": "clean"},
        Reader("clean", sequence=True, shift=True),
    ),
}


@pytest.mark.parametrize("reading", list(READINGS))
def test_elbo(tmp_path: Path, reading: str) -> None:
    spec, config, read = READINGS[reading]
    masking = "uniform" if read.kind == "full" else "per_block"
    trainer, found = one_step(tmp_path, ROWS, model=dllm(**spec), config={"masking": masking, **config})
    plain = Plain(dllm(**spec), read)
    rows = [plain.elbo(row, weighting="elbo", normalize="token") for row in masked_rows(trainer)]
    assert_step(trainer, found, mean(rows), student=plain.student)


@pytest.mark.parametrize("normalize", ["token", "sequence"])
@pytest.mark.parametrize(("weighting", "masking"), [("elbo", "uniform"), ("uniform", "uniform"), ("cart", "blocks")])
def test_weightings(tmp_path: Path, weighting: Any, normalize: Any, masking: str) -> None:
    objective = MaskedELBO(weighting=weighting, normalize=normalize)
    trainer, found = one_step(tmp_path, ROWS, objective=objective, config={"masking": masking})
    plain = Plain(dllm())
    rows = [plain.elbo(row, weighting=weighting, normalize=normalize) for row in masked_rows(trainer)]
    assert_step(trainer, found, mean(rows), student=plain.student)


@pytest.mark.parametrize("padding", ["none", "block", "length"])
def test_a_causal_model_becomes_one_and_learns_its_padding(tmp_path: Path, padding: str) -> None:
    """The model as it is read both ways, one more row in its embeddings, end tokens behind the rows that end."""
    config = {"mask_token": MASK_TOKEN, "shift": True, "eos_padding": padding, "response_length": 13}
    model = tiny_llama(V).double()
    tokenizer = tiny_tokenizer()
    trainer = diffusion_trainer(tmp_path, ROWS, model=model, processing_class=tokenizer, config=config)
    student, gradients = copy.deepcopy(trainer.model), Gradients()
    assert student.config.is_causal is False and student.get_input_embeddings().weight.shape[0] == SIZE
    torch.testing.assert_close(student.get_input_embeddings().weight[:V], tiny_llama(V).double().get_input_embeddings().weight)
    trainer.add_callback(gradients)
    trainer.train()
    rows, plain = masked_rows(trainer), Plain(student, Reader(shift=True))
    added = [len(row.ids) - len(text.ids) for row, text in zip(rows, ROWS, strict=True)]
    assert added == {"none": [0, 0, 0, 0], "block": [2, 0, 1, 0], "length": [3, 0, 2, 0]}[padding]
    assert all(row.ids[len(row.ids) - n :] == [EOS] * n for row, n in zip(rows, added, strict=True))
    losses = [plain.elbo(row, weighting="elbo", normalize="token") for row in rows]
    assert_step(trainer, gradients.steps[0], mean(losses), student=student, tolerance=1e-5)


def certain(plain: Plain, rows: Sequence[Masked], objective: CertaintyForcing, *, parts: Sequence[int] = ()) -> Tensor:
    """scale (CE + CE' + weight (H + H')); ``parts``: rows of each micro-batch, all in one without."""
    total, begin = torch.zeros((), dtype=torch.float64), 0
    views = [[row.where() for row in rows], [[s and not m for s, m in zip(r.segment, r.where(), strict=True)] for r in rows]]
    for number, masks in enumerate(views[: 1 + objective.complementary]):
        total = total + mean([{"ce": plain.cross_entropy(row, m)} for row, m in zip(rows, masks, strict=True)])
        if number and objective.certainty_on == "first":
            continue
        scored, begin = sum(map(sum, masks)), 0
        for size in parts or [len(rows)]:
            own = list(zip(rows, masks, strict=True))[begin : begin + size]
            entropies = mean([{"h": plain.right(row, m, temperature=objective.temperature)} for row, m in own])
            share = sum(sum(m) for _, m in own) / scored
            total, begin = total + objective.weight * share * entropies, begin + size
    return objective.scale * total


FIRST = CertaintyForcing(weight=1.5, temperature=0.8, scale=0.25, certainty_on="first")


@pytest.mark.parametrize(
    ("reading", "objective"),
    [*((name, CertaintyForcing()) for name in ("full", "shift", "noisy", "clean-shift")), ("full", FIRST), ("clean", FIRST)],
    ids=["full", "shift", "noisy", "clean-shift", "first-full", "first-clean"],
)
def test_certainty_forcing(tmp_path: Path, reading: str, objective: CertaintyForcing) -> None:
    spec, config, read = READINGS[reading]
    trainer, found = one_step(tmp_path, ROWS, model=dllm(**spec), objective=objective, config=config)
    assert trainer.masking.kind == "blocks"
    plain = Plain(dllm(**spec), read)
    masked = masked_rows(trainer)
    right = sum(plain.right(row, row.where(), temperature=1.0)[1] for row in masked)
    assert 0 < right < sum(sum(row.where()) for row in masked)
    assert_step(trainer, found, certain(plain, masked, objective), student=plain.student)


def test_certainty_forcing_of_one_view_and_the_whole_response(tmp_path: Path) -> None:
    objective = CertaintyForcing(complementary=False)
    config = {"masking": "response", "mask_ratio": 0.7}
    trainer, found = one_step(tmp_path, ROWS, objective=objective, config=config)
    plain = Plain(dllm())
    assert_step(trainer, found, certain(plain, masked_rows(trainer), objective), student=plain.student)


def test_certainty_is_a_mean_of_each_micro_batch(tmp_path: Path) -> None:
    objective = CertaintyForcing()
    config = {"masking": "uniform", "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    gradients = Gradients()
    trainer = diffusion_trainer(tmp_path, ROWS, objective=objective, config=config, callbacks=[gradients])
    seen = trainer.data_collator = Seen(trainer.data_collator)
    trainer.train()
    by_id = {row.row()["sample_id"]: row for row in ROWS}
    plain, masked = Plain(dllm()), masked_rows(trainer, [by_id[sample] for sample in seen.samples])
    expected = certain(plain, masked, objective, parts=(2, 2))
    assert abs(expected.item() - certain(plain, masked, objective).item()) > 1e-4
    assert_step(trainer, gradients.steps[0], expected, student=plain.student)


class Seen:
    """A collator that notes the rows in the order in which they come."""

    def __init__(self, collator: Any) -> None:
        self.collator, self.samples = collator, list[int]()

    def __call__(self, rows: Sequence[Any]) -> Any:
        self.samples += [row["sample_id"] for row in rows]
        return self.collator(rows)


@pytest.mark.parametrize("reading", ["full", "shift", "noisy", "clean-shift"])
def test_mask_consistency(tmp_path: Path, reading: str) -> None:
    spec, config, read = READINGS[reading]
    weights = {"consistency": 0.7, "cross_entropy": 0.3, "distill": 2.0}
    objective = MaskConsistency(weight=0.7, cross_entropy_weight=0.3, distill_weight=2.0, share_range=(0.2, 0.9))
    trainer, found = one_step(tmp_path, ROWS, model=dllm(**spec), objective=objective, config=config)
    plain = Plain(dllm(**spec), read, teacher_read=Reader("full" if read.kind == "full" else "noisy", shift=read.shift))
    rows = [plain.consistency(row, divergence=forward_kl, low=0.2, high=0.9) for row in masked_rows(trainer)]
    assert_step(trainer, found, mean(rows, weights), student=plain.student)


def test_sharpened_teacher(tmp_path: Path) -> None:
    objective = SharpenedKL(temperature=0.6, weight=0.8, cross_entropy_weight=0.5)
    trainer, found = one_step(tmp_path, ROWS, teacher=dllm(1), objective=objective)
    plain = Plain(dllm(), teacher=dllm(1))
    losses = [plain.sharpened(row, temperature=0.6) for row in masked_rows(trainer)]
    assert mean([{"distill": row["distill"]} for row in losses]).item() > 1e-2, "the teacher must be right somewhere"
    assert_step(trainer, found, mean(losses, {"distill": 0.8, "cross_entropy": 0.5}), student=plain.student)


@pytest.mark.parametrize(
    ("reading", "divergence", "plainly"),
    [("full", None, reverse_kl), ("shift", ForwardKL(), forward_kl), ("noisy", None, reverse_kl)],
    ids=["full", "shift", "noisy"],
)
def test_step_halving(tmp_path: Path, reading: str, divergence: Any, plainly: Any) -> None:
    spec, config, read = READINGS[reading]
    objective = StepHalving(sampling_steps=4, rounds=1, **({} if divergence is None else {"divergence": divergence}))
    trainer, found = one_step(tmp_path, ROWS, model=dllm(**spec), teacher=dllm(1, **spec), objective=objective, config=config)
    plain = Plain(dllm(**spec), read, teacher=dllm(1, **spec))

    def halved(row: Text) -> Terms:
        masked, uniform = masked_of(trainer, row), uniform_of(trainer, row)
        return plain.halved(masked, sampling_steps=4, divergence=plainly, uniform=uniform)

    rows = [halved(row) for row in ROWS]
    assert_step(trainer, found, mean(rows), student=plain.student)


@pytest.mark.parametrize("shift", [False, True])
@pytest.mark.parametrize("context", ["noisy", "clean"])
def test_diffusion_forcing(tmp_path: Path, context: Any, shift: bool) -> None:
    """A student that reads blocks, a teacher that reads all of it."""
    spec = {**BLOCKS, "shift": shift}
    given = {"model": dllm(**spec), "teacher": dllm(1, shift=shift), "config": {"context": context}}
    trainer, found = one_step(tmp_path, ROWS, objective=DiffusionForcing(), **given)
    assert trainer.masking.kind == "monotone"
    read = Reader(context, shift=shift)
    plain = Plain(dllm(**spec), read, teacher=dllm(1), teacher_read=Reader(shift=shift))
    assert_step(trainer, found, mean([plain.forcing(row) for row in masked_rows(trainer)]), student=plain.student)


def test_full_attention_becomes_block_causal(tmp_path: Path) -> None:
    """By the option alone, below an adapter; the teacher is the model as it was, reading both ways."""
    gradients, config = Gradients(), {"attention": "block_causal"}
    trainer = diffusion_trainer(
        tmp_path, ROWS, objective=DiffusionForcing(), peft_config=lora(), callbacks=[gradients], config=config
    )
    assert isinstance(trainer.teacher, SelfTeacher) and trainer.teacher.kind == "adapter_off"
    student = copy.deepcopy(trainer.model)
    trainer.train()
    plain = Plain(student, Reader("noisy"), teacher=dllm(), teacher_read=Reader())
    loss = mean([plain.forcing(row) for row in masked_rows(trainer)])
    assert_step(trainer, gradients.steps[0], loss, student=student)
    assert trainer.spec.attention == "block_causal" and trainer.spec.block_length == 4


def test_trajectories_are_masked_from_their_end(tmp_path: Path) -> None:
    """At progress 1 the share is the largest: 0.5 of a block, the tokens that were committed last."""
    config = {"masking": "trajectory", "ratio_range": (0.5, 0.5)}
    trainer, found = one_step(tmp_path, ROWS, objective=CertaintyForcing(weight=0.0, complementary=False), config=config)
    plain, rows = Plain(dllm()), masked_rows(trainer)
    for row, source in zip(rows, ROWS, strict=True):
        steps = dict(zip([c for c, own in enumerate(source.learnt) if own], source.steps, strict=True))
        block = [c for c, own in enumerate(row.segment) if own]
        hidden = [c for c in block if row.where()[c]]
        assert len(hidden) == max(1, int(0.5 * len(block) + 0.5))
        assert min(steps[c] for c in hidden) >= max([0, *(steps[c] for c in block if c not in hidden)])
    losses = [{"ce": plain.cross_entropy(row, row.where())} for row in rows]
    assert_step(trainer, found, mean(losses), student=plain.student)


def test_a_row_of_two_turns_has_blocks_of_its_own_turns() -> None:
    two = text(random.Random(0), (2, 5), (3, 6))
    assert Reader("noisy").blocks(two.learnt) == [(0, 2), (2, 6), (6, 7), (7, 10), (10, 14), (14, 16)]
