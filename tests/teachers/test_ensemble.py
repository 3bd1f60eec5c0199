"""A mixture of teachers is the explicit mixture of their probabilities, for every objective and however it is cut."""

from __future__ import annotations

import math
from importlib import import_module
from typing import Any

import pytest
import torch
from torch import Tensor

from kdlib.kernels.outcomes import top_k
from kdlib.objectives import ForwardKL, PlackettLuce, RowObjective
from kdlib.serving import BadRowsError
from kdlib.teachers import EnsembleTeacher, HFTeacher
from kdlib.teachers.composed import MixtureSignal
from kdlib.types import Head, Support, TeacherSignal
from tests.objectives.cases import CASES
from tests.teachers.fakes import ROWS, Fixed, collated, graded
from tests.tiny import tiny_llama

CHUNKED = import_module("kdlib.kernels.chunked")
N, V = 300, 11
WEIGHTS = (0.5, 0.2, 0.3)


def members(n: int = N, *, sizes: tuple[int, ...] = (V, V, V)) -> list[TeacherSignal]:
    """Two heads of different width, one of them with a soft cap, and dense logits."""
    generator = torch.Generator().manual_seed(1)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    return [
        TeacherSignal(hidden=random(n, 8), head=Head(weight=random(sizes[0], 8))),
        TeacherSignal(hidden=random(n, 5), head=Head(weight=random(sizes[1], 5), softcap=3.0)),
        TeacherSignal(logits=2.0 * random(n, sizes[2])),
    ]


def mixture(parts: list[TeacherSignal], weights: tuple[float, ...] = WEIGHTS) -> MixtureSignal:
    return MixtureSignal(members=tuple(parts), log_weights=tuple(math.log(w) for w in weights))


def explicit(parts: list[TeacherSignal], *, temperature: float, vocab: int = V) -> Tensor:
    """log sum_m w_m softmax(z_m / T) over probabilities, not logs."""
    logits = [part.logits if part.logits is not None else part.head(part.hidden) for part in parts]  # type: ignore[misc, arg-type]
    probabilities = [w * (z[:, :vocab] / temperature).softmax(-1) for w, z in zip(WEIGHTS, logits, strict=True)]
    return torch.stack(probabilities).sum(0).log()


@pytest.mark.parametrize("impl", ["reference", "chunked"])
@pytest.mark.parametrize("name", sorted(CASES.keys() - {"sum"}))  # whose parts have different temperatures
def test_every_objective_sees_the_explicit_mixture(name: str, impl: str) -> None:
    objective: RowObjective = CASES[name]
    parts, T = members(), objective.tau if isinstance(objective, PlackettLuce) else 1.0
    dense = TeacherSignal(logits=T * explicit(parts, temperature=T))
    wanted, of_wanted = graded(objective, dense, impl=impl, n=N, vocab=V)
    found, of_found = graded(objective, mixture(parts), impl=impl, n=N, vocab=V)
    assert found.sum.item() == pytest.approx(wanted.sum.item(), rel=1e-10)
    for gradient, other in zip(of_found, of_wanted, strict=True):
        torch.testing.assert_close(gradient, other, rtol=1e-8, atol=1e-10)
    if T == 1.0:
        metrics = ({name: total.item() for name, (total, _) in loss.metrics.items()} for loss in (found, wanted))
        assert next(metrics) == pytest.approx(next(metrics))


def test_members_are_tempered_before_they_are_mixed() -> None:
    parts = members()
    signal, wanted = mixture(parts), explicit(parts, temperature=2.0)
    torch.testing.assert_close(signal.at(slice(None), 2.0).logp, wanted)
    assert (wanted - (explicit(parts, temperature=1.0) / 2.0).log_softmax(-1)).abs().max() > 1e-2  # which mixes first
    loss, _ = graded(ForwardKL(temperature=2.0), signal, impl="chunked", n=N, vocab=V)
    plain = graded(ForwardKL(temperature=2.0), TeacherSignal(logits=2.0 * wanted), impl="chunked", n=N, vocab=V)[0]
    assert loss.sum.item() == pytest.approx(plain.sum.item(), rel=1e-10)


@pytest.mark.parametrize("rows", [1, 7, 64])
def test_chunks_and_blocks_change_nothing(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, of_whole = graded(ForwardKL(), mixture(members()), impl="chunked", n=N, vocab=V)
    monkeypatch.setattr(CHUNKED, "CPU_CHUNK", rows)
    monkeypatch.setattr(CHUNKED, "CPU_BLOCK_BYTES", 3 * V * 8)
    cut, of_cut = graded(ForwardKL(), mixture(members()), impl="chunked", n=N, vocab=V)
    assert cut.sum.item() == pytest.approx(whole.sum.item(), rel=1e-12)
    for gradient, other in zip(of_cut, of_whole, strict=True):
        torch.testing.assert_close(gradient, other)


def test_the_top_k_of_a_mixture_is_the_mixtures_own() -> None:
    parts = members(20)
    found, wanted = top_k(mixture(parts).at(slice(None), 1.0), 4), explicit(parts, temperature=1.0).topk(4)
    assert torch.equal(found.ids, wanted.indices)  # type: ignore[arg-type]
    torch.testing.assert_close(found.logp, wanted.values)
    torch.testing.assert_close(found.logp.exp().sum(-1) + found.rest.exp(), torch.ones(20, dtype=torch.float64))


def test_members_with_padded_vocabularies_are_cut_to_the_smallest() -> None:
    parts = members(20, sizes=(V + 3, V, V + 5))
    signal = mixture(parts)
    assert signal.vocab_size == V and len(signal) == 20 and signal.support is Support.FULL
    torch.testing.assert_close(signal.at(slice(None), 1.0).logp, explicit(parts, temperature=1.0))
    torch.testing.assert_close(signal.sliced(6).at(slice(None), 1.0).logp, explicit(parts, temperature=1.0, vocab=6))


def test_columns_that_no_member_can_emit_stay_impossible() -> None:
    one, other = torch.zeros(2, 4), torch.zeros(2, 4)
    one[:, 1:3], other[:, 2] = -torch.inf, -torch.inf
    found = mixture([TeacherSignal(logits=one), TeacherSignal(logits=other)], (0.5, 0.5)).at(slice(None), 1.0).logp.exp()
    torch.testing.assert_close(found, torch.tensor([[5 / 12, 1 / 6, 0.0, 5 / 12]]).expand(2, 4))


def test_two_models_over_a_batch_and_one_of_weight_zero() -> None:
    models = [tiny_llama(32, seed=seed).double() for seed in (1, 2)]
    batch, where = collated(ROWS)
    teacher = EnsembleTeacher([HFTeacher(model) for model in models], weights=[3, 1])
    logits = [
        model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits.flatten(0, 1)[where.index]
        for model in models
    ]
    wanted = (0.75 * logits[0].softmax(-1) + 0.25 * logits[1].softmax(-1)).log()
    torch.testing.assert_close(teacher.signal(batch, where).at(slice(None), 1.0).logp, wanted)
    alone = EnsembleTeacher([HFTeacher(model) for model in models], weights=[0, 5])
    torch.testing.assert_close(alone.signal(batch, where).at(slice(None), 1.0).logp, logits[1].log_softmax(-1))


FULL, SHORT = (
    Fixed(members(2)[2]),
    Fixed(TeacherSignal(logp=torch.zeros(2, 1), ids=torch.zeros(2, 1, dtype=torch.long), support=Support.TOPK)),
)


@pytest.mark.parametrize(
    ("teachers", "weights", "message"),
    [
        ([], None, "needs teachers"),
        ([FULL, FULL], [1.0], "2 teachers and 1 weights"),
        ([FULL, FULL], [1.0, -0.5], "0 or more"),
        ([FULL, FULL], [1.0, math.nan], "0 or more"),
        ([FULL, FULL], [0.0, 0.0], "not all 0"),
        ([FULL, SHORT], None, "mixes whole distributions, Fixed gives Support.TOPK"),
    ],
)
def test_what_makes_no_mixture_is_refused(teachers: list[Any], weights: list[float] | None, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        EnsembleTeacher(teachers, weights=weights)
    assert "\n" not in str(error.value)


def test_layers_are_refused() -> None:
    batch, where = collated(ROWS)
    with pytest.raises(ValueError, match="single teacher"):
        EnsembleTeacher([FULL, FULL]).signal(batch, where, (1,))


class Picky:
    """Random answers, the same for the same token; refuses a batch that scores the positions of one sample."""

    provides = Support.FULL

    def __init__(self, *, seed: int, unusable: int) -> None:
        self.table = torch.randn(32, V, generator=torch.Generator().manual_seed(seed))
        self.unusable = unusable

    def signal(self, batch: Any, positions: Any, layers: tuple[int, ...] = ()) -> TeacherSignal:
        keep = batch["sample_id"][positions.sequence] != self.unusable
        signal = TeacherSignal(logits=self.table[batch["input_ids"].flatten()[positions.index[keep]]])
        if not keep.all():
            raise BadRowsError(keep=keep, signal=signal, samples=[self.unusable], reason="it is NaN")
        return signal


def test_rows_that_one_member_cannot_answer_are_left_out_of_the_mixture() -> None:
    batch, where = collated(ROWS)
    teachers = [Picky(seed=1, unusable=12), Picky(seed=2, unusable=0), Picky(seed=3, unusable=14)]
    with pytest.raises(BadRowsError, match="sample 12, 14: it is NaN") as error:
        EnsembleTeacher(teachers, weights=WEIGHTS).signal(batch, where)
    keep = error.value.keep
    assert keep.tolist() == [sample in (11, 13) for sample in batch["sample_id"][where.sequence].tolist()]
    tokens = batch["input_ids"].flatten()[where.index[keep]]
    wanted = torch.stack([w * t.table[tokens].softmax(-1) for w, t in zip(WEIGHTS, teachers, strict=True)]).sum(0).log()
    assert error.value.signal is not None
    torch.testing.assert_close(error.value.signal.at(slice(None), 1.0).logp, wanted)
