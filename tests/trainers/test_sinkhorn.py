"""SinkhornTrainer's steps against a loop over groups of whole rows in float64; what may not matter; what it refuses."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from kdlib.data import DistillationCollator
from kdlib.objectives import CrossEntropy, ForwardKL, ReverseKL, Sinkhorn, Sum
from kdlib.trainers import SinkhornTrainer
from kdlib.types import Loss
from tests.tiny import tiny_llama, tiny_tokenizer
from tests.trainers.sinkhorn_plain import Row, draws_of, plain_transport, tempered
from tests.trainers.small import (
    Gradients,
    PlainLoss,
    V,
    assert_same,
    cross_entropy,
    double,
    forward_kl,
    logged,
    lora,
    plain_gradients,
    plain_loss,
    reverse_kl,
    settings,
)

ROWS = [{"text": f"{'two plus ' * (1 + 5 * i % 7)}{i}"} for i in range(12)]
EIGHT, THREE = ROWS[:8], ROWS[:3]
# Far from converged, so that every iteration shows in the loss.
SHORT: dict[str, Any] = {"iterations": 3, "epsilon": 0.03, "temperature": 0.5}
BY_BATCH, BY_SEQUENCE = Sinkhorn(**SHORT), Sinkhorn(group="sequence", **SHORT)
SAMPLE = Sinkhorn(geometry="sample", top_k=6, iterations=5, weight=0.5)
SINKD = Sum(parts=((0.9, ForwardKL(temperature=4.0, t_squared=True)), (0.1, CrossEntropy())))


def sinkhorn_trainer(
    directory: Path, objective: Sinkhorn, *, rows: Any = EIGHT, config: dict[str, Any] | None = None, **given: Any
) -> SinkhornTrainer:
    arguments = {
        "model": double(),
        "teacher": double(1),
        "train_dataset": rows,
        "processing_class": tiny_tokenizer(),
        **given,
    }
    options = {"per_device_train_batch_size": 8, "max_grad_norm": 1e9, **(config or {})}
    return SinkhornTrainer(**arguments, objective=objective, args=settings(directory, **options))


@dataclass(kw_only=True)
class Seen:
    """The scored rows of every pass: {sample: the numbers that its rows drew} of each micro-batch."""

    draws: list[dict[int, list[float]]]

    @property
    def samples(self) -> list[list[int]]:
        """Those of each micro-batch."""
        return [list(batch) for batch in self.draws]


def watched(trainer: SinkhornTrainer) -> Seen:
    """What ``terms`` is called with from now on."""
    seen, original = Seen(draws=[]), trainer.terms

    def terms(model: nn.Module, batch: dict[str, Any], signals: Any) -> dict[str, Loss]:
        positions = batch["positions"]["distill"]
        drawn = [torch.nan] * len(positions) if positions.uniform is None else positions.uniform.tolist()
        of_sample: dict[int, list[float]] = {sample: [] for sample in batch["sample_id"].tolist()}
        for sequence, number in zip(positions.sequence.tolist(), drawn, strict=True):
            of_sample[int(batch["sample_id"][sequence])].append(number)
        seen.draws.append(of_sample)
        return original(model, batch, signals)

    trainer.terms = terms  # type: ignore[method-assign]
    return seen


def one_step(directory: Path, objective: Sinkhorn, **given: Any) -> tuple[SinkhornTrainer, dict[str, Tensor], list[list[Row]]]:
    """(the trainer after a step, its gradients, the rows of each micro-batch)."""
    gradients = Gradients()
    trainer = sinkhorn_trainer(directory, objective, callbacks=[gradients], **given)
    seen = watched(trainer)
    trainer.train()
    rows = {row["sample_id"]: row for row in trainer.train_dataset if not isinstance(row["sample_id"], list)}
    return trainer, gradients.steps[0], [[rows[sample] for sample in batch if sample in rows] for batch in seen.samples]


def singles(batches: Sequence[Sequence[Row]]) -> list[list[Row]]:
    return [[row] for batch in batches for row in batch]


def assert_step(
    trainer: SinkhornTrainer,
    found: dict[str, Tensor],
    groups: list[list[Row]],
    *,
    plain: PlainLoss | None,
    student: nn.Module | None = None,
    teacher: nn.Module | None = None,
    tolerance: float = 1e-6,
    **how: Any,
) -> None:
    """Loss, logged parts and gradients are mean(divergence) + weight * transport."""
    student, teacher, options = student or double(), teacher or double(1), trainer.objective
    moved = plain_transport(student, teacher, groups, options, **how)
    expected = options.weight * moved.value
    if plain is not None:
        divergence = plain_loss(student, teacher, [row for group in groups for row in group], plain)
        assert logged(trainer, "divergence") == [pytest.approx(divergence.item(), rel=1e-6)]
        expected = expected + divergence
    assert logged(trainer, "sinkhorn") == [pytest.approx(moved.value.item(), rel=1e-6)]
    errors = [pytest.approx(moved.error, rel=1e-4, abs=1e-9)] if options.geometry == "batch" else []
    assert logged(trainer, "sinkhorn_marginal_error") == errors
    assert logged(trainer) == [pytest.approx(expected.item(), rel=1e-6)]
    assert_same(found, plain_gradients(student, expected), tolerance=tolerance)


# A step


@pytest.mark.parametrize("group", ["batch", "sequence"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"cost": "sqeuclidean", "epsilon": 0.01, "weight": 2.0},
        {"top_k": 5},
        {"top_k": 5, "cost": "sqeuclidean", "epsilon": 0.01},
        {"loss": "dual"},
        {"debiased": True},
        {"debiased": True, "loss": "dual", "cost": "sqeuclidean", "epsilon": 0.01},
        {"normalize": "sinkd", "weight": 0.0008},
        {"max_rows": 7},
        {"max_rows": 7, "debiased": True},
        {"max_rows": 7, "top_k": 5},
    ],
    ids=str,
)
def test_a_step_moves_the_rows_of_each_group(tmp_path: Path, options: dict[str, Any], group: Any) -> None:
    objective = Sinkhorn(group=group, **{**SHORT, **options})
    trainer, found, batches = one_step(tmp_path, objective)
    assert logged(trainer, "sinkhorn_marginal_error")[0] > 1e-6
    groups = batches if group == "batch" else singles(batches)
    assert len(groups) == (1 if group == "batch" else 8)
    draws = draws_of(seed=trainer.args.seed, step=1) if "max_rows" in options else None
    assert_step(trainer, found, groups, plain=forward_kl, draws=draws)


@pytest.mark.parametrize(
    ("divergence", "plain"),
    [
        (ReverseKL(), reverse_kl),
        (ForwardKL(temperature=2.0), tempered(forward_kl, 2.0)),
        (
            SINKD,
            lambda p, q, labels: 0.9 * 16 * tempered(forward_kl, 4.0)(p, q, labels) + 0.1 * cross_entropy(p, q, labels),
        ),
    ],
    ids=lambda given: type(given).__name__,
)
@pytest.mark.parametrize("objective", [BY_BATCH, SAMPLE], ids=["batch", "sample"])
def test_the_divergence_is_any_loss_of_rows(tmp_path: Path, objective: Sinkhorn, divergence: Any, plain: Any) -> None:
    """With SINKD as divergence it is SinKD's three losses."""
    trainer, found, batches = one_step(tmp_path, replace(objective, divergence=divergence), rows=THREE)
    points = None if objective.geometry == "batch" else double(1).get_input_embeddings().weight
    assert_step(trainer, found, batches, plain=plain, points=points)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"divergence": None},
        {"token_cost": "l1", "temperature": 1.0},
        {"token_cost": "sqeuclidean", "top_k": None},
        {"loss": "dual"},
        {"debiased": True},
        {"debiased": True, "loss": "dual", "divergence": None},
    ],
    ids=str,
)
def test_a_step_moves_the_tokens_of_each_row(tmp_path: Path, options: dict[str, Any]) -> None:
    objective = replace(SAMPLE, **options)
    trainer, found, batches = one_step(tmp_path, objective, rows=THREE)
    plain = None if objective.divergence is None else forward_kl
    assert_step(trainer, found, batches, plain=plain, points=double(1).get_input_embeddings().weight)


@pytest.mark.parametrize("objective", [BY_SEQUENCE, SAMPLE], ids=["batch", "sample"])
def test_an_adapter_gets_the_gradient_of_autograd(tmp_path: Path, objective: Sinkhorn) -> None:
    gradients = Gradients()
    trainer = sinkhorn_trainer(tmp_path, objective, rows=THREE, callbacks=[gradients], peft_config=lora())
    student = copy.deepcopy(trainer.model)
    trainer.train()
    found, groups = gradients.steps[0], [[row] for row in trainer.train_dataset]
    assert found and all("lora_" in name for name in found)
    assert_step(
        trainer, found, groups, plain=forward_kl, student=student, points=double(1).get_input_embeddings().weight.detach()
    )


def test_token_points_are_the_students_of_each_step(tmp_path: Path) -> None:
    """As they are after the step before, and without a gradient of their own."""
    objective = replace(SAMPLE, token_points="student")
    trainer, found, batches = one_step(tmp_path, objective, rows=THREE)
    assert_step(trainer, found, batches, plain=forward_kl, points=double().get_input_embeddings().weight.detach())

    second = sinkhorn_trainer(
        tmp_path,
        objective,
        rows=THREE,
        config={"max_steps": 2, "learning_rate": 0.05, "lr_scheduler_type": "constant"},
    )
    steps: list[nn.Module] = []
    second.terms = _copying(second, steps)  # type: ignore[method-assign]
    second.train()
    at_second, groups = steps[1], [list(second.train_dataset)]
    points = at_second.get_input_embeddings().weight.detach().clone()  # type: ignore[operator]
    moved = plain_transport(at_second, double(1), groups, objective, points=points)
    assert logged(second, "sinkhorn")[1] == pytest.approx(moved.value.item(), rel=1e-6)
    before = plain_transport(at_second, double(1), groups, objective, points=double().get_input_embeddings().weight)
    assert abs(moved.value.item() - before.value.item()) > 1e-5


def _copying(trainer: SinkhornTrainer, steps: list[nn.Module]) -> Any:
    original = trainer.terms

    def terms(model: nn.Module, batch: dict[str, Any], signals: Any) -> dict[str, Loss]:
        steps.append(copy.deepcopy(model))
        return original(model, batch, signals)

    return terms


def test_token_points_of_a_file(tmp_path: Path) -> None:
    """Of another width than either model's, and longer than the vocabulary as embeddings are that were padded."""
    points = torch.randn(V + 8, 5, generator=torch.Generator().manual_seed(3))
    save_file({"points": points}, tmp_path / "points.safetensors")
    objective = replace(SAMPLE, token_points=str(tmp_path / "points.safetensors"))
    trainer, found, batches = one_step(tmp_path / "run", objective, rows=THREE)
    # distances of float32 vectors are float32
    assert_step(trainer, found, batches, plain=forward_kl, points=points[:V], tolerance=1e-5)


# How a step is cut


@pytest.mark.parametrize("objective", [BY_SEQUENCE, replace(BY_SEQUENCE, max_rows=7), SAMPLE], ids=["all", "drawn", "sample"])
def test_accumulation_does_not_matter_where_groups_are_sequences(tmp_path: Path, objective: Sinkhorn) -> None:
    whole, expected, _ = one_step(tmp_path, objective)
    for size in (2, 3):
        shape = {"per_device_train_batch_size": size, "gradient_accumulation_steps": -(-8 // size)}
        cut, found, batches = one_step(tmp_path, objective, config=shape)
        assert len(batches) == -(-8 // size)
        assert logged(cut) == pytest.approx(logged(whole), rel=1e-6)  # logged in float32
        for key in ("sinkhorn", "divergence", "scored_tokens"):
            assert logged(cut, key) == pytest.approx(logged(whole, key), rel=1e-9), key
        assert_same(found, expected, tolerance=1e-9)


@pytest.mark.parametrize("options", [{}, {"max_rows": 20}], ids=str)
def test_groups_of_a_batch_are_those_of_each_micro_batch_weighted_by_their_rows(
    tmp_path: Path, options: dict[str, Any]
) -> None:
    objective = replace(BY_BATCH, **options)
    shape = {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 3}
    trainer, found, batches = one_step(tmp_path, objective, config=shape)
    assert [len(batch) for batch in batches] == [3, 3, 2]
    draws = draws_of(seed=trainer.args.seed, step=1) if options else None
    assert_step(trainer, found, batches, plain=forward_kl, draws=draws)
    together = plain_transport(double(), double(1), [[row for batch in batches for row in batch]], objective, draws=draws)
    assert abs(logged(trainer, "sinkhorn")[0] - together.value.item()) > 1e-3, "else nothing was told apart"


@pytest.mark.parametrize("objective", [BY_SEQUENCE, replace(BY_SEQUENCE, max_rows=7), SAMPLE], ids=["all", "drawn", "sample"])
@pytest.mark.parametrize(
    "given",
    [
        {"data_collator": DistillationCollator(0, pad_to_multiple_of=64)},
        {"rows": EIGHT[::-1]},
        {"config": {"packing": True, "max_length": 128}},
    ],
    ids=["padded", "reversed", "packed"],
)
def test_padding_and_the_order_of_rows_do_not_matter(tmp_path: Path, objective: Sinkhorn, given: dict[str, Any]) -> None:
    plain, expected, _ = one_step(tmp_path, objective)
    other, found, _ = one_step(tmp_path, objective, **given)
    for key in ("loss", "sinkhorn", "divergence"):
        assert logged(other, key) == pytest.approx(logged(plain, key), rel=1e-6), key
    assert_same(found, expected)


def evaluated(trainer: SinkhornTrainer) -> dict[str, float]:
    timed = ("runtime", "per_second", "preparation_time")
    return {key: value for key, value in trainer.evaluate().items() if not key.endswith(timed)}


@pytest.mark.parametrize("options", [{}, {"max_rows": 7}], ids=str)
def test_evaluation_does_not_depend_on_mates_where_groups_are_sequences(tmp_path: Path, options: dict[str, Any]) -> None:
    """By batches of 1, 3 and 7 rows, and with longer mates; the draws are those of step 0."""
    objective = replace(BY_SEQUENCE, **options)
    found = []
    for size in (1, 3, 7):
        trainer = sinkhorn_trainer(
            tmp_path, objective, eval_dataset=ROWS[:7], config={"per_device_eval_batch_size": size, "max_steps": 1}
        )
        found.append(evaluated(trainer))
    assert trainer.eval_dataset is not None
    draws = draws_of(seed=trainer.args.seed, step=0) if options else None
    moved = plain_transport(double(), double(1), [[row] for row in trainer.eval_dataset], objective, draws=draws)
    divergence = plain_loss(double(), double(1), trainer.eval_dataset, forward_kl)
    assert found[0]["eval_loss"] == pytest.approx((divergence + 0.8 * moved.value).item(), rel=1e-9)
    assert found[0]["eval_sinkhorn"] == pytest.approx(moved.value.item(), rel=1e-9)
    for other in found[1:]:
        assert other == pytest.approx(found[0], rel=1e-7)
    trainer.train()
    assert evaluated(trainer)["eval_sinkhorn"] != pytest.approx(moved.value.item(), rel=1e-4), "the student has moved"


def test_evaluation_of_batch_wise_groups_is_the_mean_over_its_batches(tmp_path: Path) -> None:
    trainer = sinkhorn_trainer(tmp_path, BY_BATCH, eval_dataset=ROWS[:7], config={"per_device_eval_batch_size": 3})
    assert trainer.eval_dataset is not None
    rows = list(trainer.eval_dataset)
    moved = plain_transport(double(), double(1), [rows[:3], rows[3:6], rows[6:]], trainer.objective)
    assert evaluated(trainer)["eval_sinkhorn"] == pytest.approx(moved.value.item(), rel=1e-6)


# The log

USUAL = {"kl_forward", "kl_reverse", "entropy_student", "entropy_teacher", "top1_agreement", "acceptance"}
CASES = {
    "batch": (BY_BATCH, {"sinkhorn", "divergence", "sinkhorn_marginal_error"}),
    "sequence": (BY_SEQUENCE, {"sinkhorn", "divergence", "sinkhorn_marginal_error"}),
    "sample": (SAMPLE, {"sinkhorn", "divergence"}),
    "alone": (replace(SAMPLE, divergence=None), {"sinkhorn"}),
}


@pytest.mark.parametrize(("objective", "own"), list(CASES.values()), ids=list(CASES))
def test_what_is_logged_and_when(tmp_path: Path, objective: Sinkhorn, own: set[str]) -> None:
    trainer = sinkhorn_trainer(
        tmp_path, objective, rows=THREE, config={"max_steps": 4, "logging_steps": 2, "logging_first_step": False}
    )
    made: list[set[str]] = []
    original = trainer.loss_of
    trainer.loss_of = lambda *given: made.append(set((loss := original(*given)).metrics)) or loss  # type: ignore
    trainer.train()
    assert [bool(names) for names in made] == [False, True, False, True]
    assert made[1] >= own | USUAL
    lines = [line for line in trainer.state.log_history if "grad_norm" in line]
    assert [line["step"] for line in lines] == [2, 4]
    everything = {"sinkhorn", "divergence", "sinkhorn_marginal_error"}
    for line in lines:
        assert line.keys() & everything == own and line.keys() >= USUAL


@pytest.mark.parametrize("objective", [objective for objective, _ in CASES.values()], ids=list(CASES))
def test_the_logged_parts_add_up_to_the_loss(tmp_path: Path, objective: Sinkhorn) -> None:
    config = {"max_steps": 4, "per_device_train_batch_size": 3, "gradient_accumulation_steps": 2, "learning_rate": 1e-2}
    trainer = sinkhorn_trainer(tmp_path, objective, rows=ROWS, config=config)
    trainer.train()
    moved, losses = logged(trainer, "sinkhorn"), logged(trainer)
    divergence = logged(trainer, "divergence") or [0.0] * 4
    assert losses == pytest.approx([d + objective.weight * s for d, s in zip(divergence, moved, strict=True)], rel=1e-5)
    assert losses[-1] < 0.9 * losses[0]


def test_the_default_is_batch_wise_beside_forward_kl(tmp_path: Path) -> None:
    trainer = SinkhornTrainer(
        tiny_llama(V),
        tiny_llama(V, seed=1),
        args=settings(tmp_path),
        train_dataset=ROWS,
        processing_class=tiny_tokenizer(),
    )
    assert trainer.objective == Sinkhorn() and trainer.objective.divergence == ForwardKL()
    trainer.train()
    assert logged(trainer, "divergence") == pytest.approx(logged(trainer, "kl_forward"), rel=1e-6)
