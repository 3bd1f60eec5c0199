"""``chunked`` against ``reference``: equal values and gradients for every head, teacher and shape."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from kdlib.kernels import linear_objective
from kdlib.objectives import CrossEntropy, ForwardKL, GeneralizedJSD, ReverseKL, RowObjective, Sum
from kdlib.types import Head, Loss, Positions, StudentSignal, Support, TeacherSignal, View
from tests.objectives.cases import CASES

Impl = Literal["reference", "chunked"]
MIXED = Sum(parts=((0.5, GeneralizedJSD(beta=0.3, temperature=2.0)), (0.5, CrossEntropy())))


@dataclass(frozen=True, kw_only=True)
class Problem:
    """Leaves of a student's head and hidden states, and what stays fixed around them."""

    leaves: dict[str, Tensor]
    labels: Tensor
    weight: Tensor | None
    teacher: TeacherSignal
    options: dict[str, Any] = field(default_factory=dict)
    frozen: tuple[str, ...] = ()

    def student(self, leaves: dict[str, Tensor]) -> StudentSignal:
        lora = (leaves["A"], leaves["B"], 0.7) if "A" in leaves else None
        head = Head(weight=leaves["weight"], bias=leaves.get("bias"), lora=lora, **self.options)
        positions = Positions(
            index=torch.arange(len(self.labels)),
            labels=self.labels,
            sequence=torch.zeros_like(self.labels),
            weight=self.weight,
        )
        return StudentSignal(hidden=leaves["hidden"], head=head, positions=positions)

    def run(
        self,
        objective: RowObjective,
        impl: Impl,
        *,
        upstream: Callable[[Tensor], Tensor] = lambda total: total,
        metrics: bool = False,
    ) -> tuple[Loss, dict[str, Tensor]]:
        """The loss and the gradient of every leaf that is not frozen."""
        leaves = {k: x.clone().requires_grad_(k not in self.frozen) for k, x in self.leaves.items()}
        loss = linear_objective(self.student(leaves), self.teacher, objective, impl=impl, metrics=metrics)
        upstream(loss.sum).backward()
        assert all(leaves[name].grad is None for name in self.frozen)
        return loss, {k: x.grad for k, x in leaves.items() if x.grad is not None}


def problem(
    n: int,
    *,
    vocab: int = 11,
    teacher_vocab: int | None = None,
    bias: bool = False,
    lora: bool = False,
    weighted: bool = False,
    dtype: torch.dtype = torch.float64,
    frozen: tuple[str, ...] = (),
    **options: Any,
) -> Problem:
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int, scale: float = 1.0) -> Tensor:
        return (scale * torch.randn(*shape, generator=generator, dtype=torch.float64)).to(dtype)

    leaves = {"hidden": random(n, 6), "weight": random(vocab, 6)}
    if bias:
        leaves["bias"] = random(vocab)
    if lora:
        leaves |= {"A": random(3, 6), "B": random(vocab, 3, scale=0.5)}
    return Problem(
        leaves=leaves,
        labels=torch.randint(0, min(vocab, teacher_vocab or vocab), (n,), generator=generator),
        weight=torch.rand(n, generator=generator, dtype=torch.float64) if weighted else None,
        teacher=TeacherSignal(hidden=random(n, 8), head=Head(weight=random(teacher_vocab or vocab, 8))),
        options=options,
        frozen=frozen,
    )


def assert_same(at: Problem, objective: RowObjective, *, upstream: Callable[[Tensor], Tensor] = lambda x: x) -> None:
    (wanted, gradients), (found, of_found) = (at.run(objective, impl, upstream=upstream) for impl in ("reference", "chunked"))
    assert found.count == wanted.count == len(at.labels)
    torch.testing.assert_close(found.sum, wanted.sum, rtol=1e-10, atol=1e-10)
    assert of_found.keys() == gradients.keys() == set(at.leaves) - set(at.frozen)
    for name, gradient in gradients.items():
        torch.testing.assert_close(of_found[name], gradient, rtol=1e-10, atol=1e-10, msg=name)


# Values and gradients -------------------------------------------------------------------------------


@pytest.mark.parametrize("objective", CASES.values(), ids=CASES)
def test_every_objective(objective: RowObjective) -> None:
    assert_same(problem(300, weighted=True), objective)


HEADS: dict[str, dict[str, Any]] = {
    "plain": {},
    "bias": {"bias": True},
    "scale": {"scale": 0.3, "bias": True},
    "softcap": {"softcap": 3.0, "scale": 0.5},
    "lora": {"lora": True, "bias": True},
    "lora_only": {"lora": True, "bias": True, "frozen": ("weight", "bias"), "softcap": 5.0},
    "frozen_head": {"bias": True, "frozen": ("weight", "bias")},
    "head_only": {"bias": True, "lora": True, "frozen": ("hidden",)},
    "adapter_only": {"lora": True, "frozen": ("hidden", "weight")},
}


@pytest.mark.parametrize("head", HEADS.values(), ids=HEADS)
def test_every_head(head: dict[str, Any]) -> None:
    assert_same(problem(270, **head), MIXED)


@pytest.mark.parametrize("n", [0, 1, 255, 256, 257, 600])
def test_every_number_of_rows(n: int) -> None:
    assert_same(problem(n, weighted=True, lora=True), MIXED)


def test_blocks_smaller_than_a_chunk() -> None:
    assert_same(problem(300, vocab=3001), GeneralizedJSD())


@pytest.mark.parametrize(("vocab", "teacher_vocab"), [(11, 14), (14, 11)])
def test_vocabularies_padded_to_different_sizes(vocab: int, teacher_vocab: int) -> None:
    at = problem(300, vocab=vocab, teacher_vocab=teacher_vocab, bias=True, lora=True)
    assert_same(at, MIXED)
    cut = {k: x[:11] if k in ("weight", "bias", "B") else x for k, x in at.leaves.items()}
    assert at.teacher.hidden is not None and at.teacher.head is not None
    same = replace(at, leaves=cut, teacher=at.teacher.sliced(11))
    (loss, gradients), (wanted, of_wanted) = at.run(MIXED, "chunked"), same.run(MIXED, "chunked")
    torch.testing.assert_close(loss.sum, wanted.sum)
    torch.testing.assert_close(gradients["weight"][:11], of_wanted["weight"])
    assert (gradients["weight"][11:] == 0).all()


def dense(at: Problem) -> Tensor:
    assert at.teacher.head is not None and at.teacher.hidden is not None
    return at.teacher.head(at.teacher.hidden)


def test_dense_teachers_are_what_hidden_states_and_head_are() -> None:
    at = problem(300)
    stored = replace(at, teacher=TeacherSignal(logits=dense(at)))
    assert_same(stored, MIXED)
    torch.testing.assert_close(stored.run(MIXED, "chunked")[0].sum, at.run(MIXED, "chunked")[0].sum)


@pytest.mark.parametrize("k", [1, 4, 11])
def test_top_k_teachers(k: int) -> None:
    at = problem(300)
    logp, ids = dense(at).log_softmax(-1).topk(k)
    top = TeacherSignal(logp=logp, ids=ids, support=Support.TOPK)
    assert_same(replace(at, teacher=top), Sum(parts=((0.5, ReverseKL()), (0.5, ForwardKL()))))


def test_sampled_teachers() -> None:
    at = problem(300)
    logp = dense(at).log_softmax(-1)
    ids = torch.multinomial(logp.exp(), 5, replacement=True, generator=torch.Generator().manual_seed(1))
    drawn = TeacherSignal(logp=logp.gather(-1, ids), ids=ids, support=Support.SAMPLED_TEACHER)
    assert_same(replace(at, teacher=drawn), ForwardKL())


@dataclass(frozen=True, kw_only=True)
class TwoSums(RowObjective):
    """Two losses of every row, kept apart."""

    accepts = Support.FULL

    def row(self, q: View, p: View | None, labels: Tensor) -> Tensor:
        parts = (ForwardKL().row(q, p, labels), CrossEntropy().row(q, p, labels))
        return torch.stack(parts, -1)


def test_several_sums_each_with_its_own_upstream() -> None:
    scalars = torch.tensor([2.0, -0.3], dtype=torch.float64)
    at = problem(300, lora=True, bias=True, weighted=True)
    assert_same(at, TwoSums(), upstream=lambda sums: sums @ scalars)
    assert at.run(TwoSums(), "chunked", upstream=torch.sum)[0].sum.shape == (2,)


def test_an_upstream_scalar_scales_all_gradients() -> None:
    at = problem(40, lora=True)
    assert_same(at, MIXED, upstream=lambda total: -3.0 * total**2)
    _, plain = at.run(MIXED, "chunked")
    _, scaled = at.run(MIXED, "chunked", upstream=lambda total: total / 8)
    for name in plain:
        torch.testing.assert_close(scaled[name], plain[name] / 8)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 5e-6), (torch.bfloat16, 4e-3)], ids=str)
@pytest.mark.parametrize("name", ["forward_kl", "reverse_kl", "jsd_0.5", "skew_kl", "sum"])
def test_precision(name: str, dtype: torch.dtype, tolerance: float) -> None:
    objective, at = CASES[name], problem(300, vocab=400, lora=True, bias=True, dtype=dtype)
    exact = replace(
        at,
        leaves={leaf: x.double() for leaf, x in at.leaves.items()},
        teacher=TeacherSignal(logits=_wide(at.teacher)),
    )
    (loss, gradients), (wanted, of_wanted) = at.run(objective, "chunked"), exact.run(objective, "reference")
    assert loss.sum.dtype == torch.float32
    assert loss.sum.item() == pytest.approx(wanted.sum.item(), rel=2e-6)
    for leaf, gradient in gradients.items():
        assert gradient.dtype == dtype
        error = (gradient.double() - of_wanted[leaf]).norm() / of_wanted[leaf].norm()
        assert error <= tolerance, leaf


def _wide(teacher: TeacherSignal) -> Tensor:
    assert teacher.hidden is not None and teacher.head is not None
    return teacher.hidden.double() @ teacher.head.weight.double().T


@pytest.mark.parametrize("impl", ["chunked", "reference"])
def test_autocast_does_not_round_anything(impl: Impl) -> None:
    at = problem(300, dtype=torch.float32, lora=True)
    outside, of_outside = at.run(MIXED, impl, metrics=True)
    leaves = {name: x.clone().requires_grad_() for name, x in at.leaves.items()}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = linear_objective(at.student(leaves), at.teacher, MIXED, impl=impl, metrics=True)
    inside.sum.backward()
    assert inside.sum.item() == outside.sum.item()
    assert inside.metrics["kl_forward"][0].item() == outside.metrics["kl_forward"][0].item()
    for name, leaf in leaves.items():
        assert leaf.grad is not None and torch.equal(leaf.grad, of_outside[name])


@dataclass(frozen=True, kw_only=True)
class ExpectedScore(RowObjective):
    """A loss with a matrix product of its own, which autocast would round."""

    accepts = None

    def row(self, q: View, p: View | None, labels: Tensor) -> Tensor:
        logq = q.at(1.0).logp
        return logq.exp() @ torch.linspace(0.0, 1.0, logq.shape[-1])


@pytest.mark.parametrize("impl", ["chunked", "reference"])
def test_autocast_does_not_round_inside_objectives(impl: Impl) -> None:
    at = problem(300, dtype=torch.float32)
    outside = linear_objective(at.student(at.leaves), None, ExpectedScore(), impl=impl)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = linear_objective(at.student(at.leaves), None, ExpectedScore(), impl=impl)
    assert inside.sum.item() == outside.sum.item()


def test_the_heads_dtype_is_what_is_multiplied() -> None:
    at = problem(40, dtype=torch.float32)
    rounded = {name: x.bfloat16() for name, x in at.leaves.items()}
    found, _ = replace(at, options={"dtype": torch.bfloat16}).run(MIXED, "chunked")
    wanted, _ = replace(at, leaves=rounded).run(MIXED, "chunked")
    assert found.sum.item() == wanted.sum.item()
    assert found.sum.item() != at.run(MIXED, "chunked")[0].sum.item()


# Graphs ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("impl", ["chunked", "reference"])
def test_without_gradients_there_is_a_value_and_no_graph(impl: Impl) -> None:
    at = problem(300, weighted=True)
    wanted, _ = at.run(MIXED, impl)
    with torch.no_grad():
        loss = linear_objective(at.student(at.leaves), at.teacher, MIXED, impl=impl)
    assert not loss.sum.requires_grad
    assert loss.sum.item() == wanted.sum.item()


@pytest.mark.parametrize("impl", ["chunked", "reference"])
def test_nothing_flows_to_the_teacher(impl: Impl) -> None:
    at = problem(20)
    assert at.teacher.hidden is not None and at.teacher.head is not None
    hidden, weight = at.teacher.hidden.requires_grad_(), at.teacher.head.weight.requires_grad_()
    at.run(MIXED, impl)
    assert hidden.grad is None and weight.grad is None


def test_a_second_backward_is_refused() -> None:
    at = problem(20)
    leaves = {name: x.clone().requires_grad_() for name, x in at.leaves.items()}
    loss = linear_objective(at.student(leaves), at.teacher, MIXED)
    loss.sum.backward(retain_graph=True)
    with pytest.raises(RuntimeError):
        loss.sum.backward()


def test_gradients_accumulate_over_calls() -> None:
    at = problem(20)
    leaves = {name: x.clone().requires_grad_() for name, x in at.leaves.items()}
    for _ in range(2):
        linear_objective(at.student(leaves), at.teacher, MIXED).sum.backward()
    _, once = at.run(MIXED, "chunked")
    for name, leaf in leaves.items():
        torch.testing.assert_close(leaf.grad, 2 * once[name])


def test_gradcheck_of_the_reference() -> None:
    at = problem(5, lora=True, bias=True, weighted=True, softcap=4.0, scale=0.8)

    def total(*leaves: Tensor) -> Tensor:
        student = at.student(dict(zip(at.leaves, leaves, strict=True)))
        return linear_objective(student, at.teacher, MIXED, impl="reference").sum

    assert torch.autograd.gradcheck(total, [x.requires_grad_() for x in at.leaves.values()])


# Metrics, memory, refusals --------------------------------------------------------------------------


@pytest.mark.parametrize("impl", ["chunked", "reference"])
def test_metrics_are_those_of_the_plain_logits_at_temperature_1(impl: Impl) -> None:
    at = problem(300, weighted=True)
    loss, _ = at.run(MIXED, impl, metrics=True)
    logq, logp = (at.leaves["hidden"] @ at.leaves["weight"].T).log_softmax(-1), dense(at).log_softmax(-1)
    wanted = {
        "kl_forward": (logp.exp() * (logp - logq)).sum(),
        "kl_reverse": (logq.exp() * (logq - logp)).sum(),
        "entropy_teacher": -(logp.exp() * logp).sum(),
        "entropy_student": -(logq.exp() * logq).sum(),
        "top1_agreement": (logp.argmax(-1) == logq.argmax(-1)).double().sum(),
        "acceptance": torch.minimum(logp.exp(), logq.exp()).sum(),
        "acceptance_greedy": logp.exp().gather(-1, logq.argmax(-1, keepdim=True)).sum(),
    }
    assert {name: total.item() for name, (total, _) in loss.metrics.items()} == pytest.approx(
        {name: total.item() for name, total in wanted.items()}
    )
    assert {count for _, count in loss.metrics.values()} == {300}
    assert at.run(MIXED, impl)[0].metrics == {}


def test_metrics_of_a_sampled_teacher_are_estimates_of_one_divergence() -> None:
    at = problem(10)
    logq, logp = (at.leaves["hidden"] @ at.leaves["weight"].T).log_softmax(-1), dense(at).log_softmax(-1)
    ids = torch.arange(20).view(10, 2) % 11
    for support, objective, names in (
        (Support.SAMPLED_TEACHER, ForwardKL(), {"kl_forward"}),
        (Support.SAMPLED_STUDENT, ReverseKL(), {"kl_reverse", "kl_k1", "kl_k3"}),
    ):
        drawn = TeacherSignal(logp=logp.gather(-1, ids), ids=ids, support=support)
        loss, _ = replace(at, teacher=drawn).run(objective, "chunked", metrics=True)
        gap = (logp - logq).gather(-1, ids) * (1 if "kl_forward" in names else -1)
        assert loss.metrics.keys() == {"entropy_student", *names}
        for name in names:
            value = (-gap).exp() - 1 + gap if name == "kl_k3" else gap
            assert loss.metrics[name][0].item() == pytest.approx(value.mean(-1).sum().item())


class LargestTensor(TorchDispatchMode):
    """Remembers the elements of the largest storage that an operation allocated."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = {x.untyped_storage().data_ptr() for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        for x in tree_leaves(result):
            if isinstance(x, Tensor) and x.untyped_storage().data_ptr() not in given:
                self.elements = max(self.elements, x.untyped_storage().nbytes() // x.element_size())
        return result


def test_no_tensor_of_all_rows_times_the_vocabulary_is_ever_made() -> None:
    n, vocab = 2048, 200
    at = problem(n, vocab=vocab, dtype=torch.float32)
    largest = {}
    for impl in ("reference", "chunked"):
        with LargestTensor() as meter:
            at.run(MIXED, impl, metrics=True)
        largest[impl] = meter.elements
    assert largest["reference"] >= n * vocab
    assert largest["chunked"] <= 256 * vocab


@pytest.mark.parametrize("trained", [False, True])
def test_only_a_trained_head_costs_a_gradient_of_its_size(trained: bool) -> None:
    n, vocab, width = 8, 4000, 64
    hidden, weight = (
        torch.randn(n, width, requires_grad=True),
        torch.randn(vocab, width, requires_grad=trained),
    )
    rows = torch.arange(n)
    positions = Positions(index=rows, labels=rows, sequence=rows)
    with LargestTensor() as meter:
        student = StudentSignal(hidden=hidden, head=Head(weight=weight), positions=positions)
        linear_objective(student, None, CrossEntropy()).sum.backward()
    assert hidden.grad is not None
    assert (meter.elements >= vocab * width) == trained


def test_wrong_calls_say_what_is_wrong() -> None:
    at = problem(10)
    student = at.student(at.leaves)
    with pytest.raises(ValueError, match="impl='fast': choose auto, reference or chunked"):
        linear_objective(student, at.teacher, MIXED, impl="fast")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="needs a teacher's signal"):
        linear_objective(student, None, MIXED)
    with pytest.raises(ValueError, match="teacher speaks of 3 rows, the student of 10"):
        linear_objective(student, TeacherSignal(logits=torch.zeros(3, 11)), MIXED)


def test_cross_entropy_needs_no_teacher_and_ignores_one() -> None:
    at = problem(300)
    with_teacher, _ = at.run(CrossEntropy(), "chunked")
    loss = linear_objective(at.student(at.leaves), None, CrossEntropy(), metrics=True)
    assert loss.sum.item() == with_teacher.sum.item()
    assert loss.metrics.keys() == {"entropy_student"}
