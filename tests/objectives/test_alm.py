"""ALM against plain loops over chunks in Python floats."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kdlib.objectives.cross import Tables
from kdlib.objectives.cross.alm import ALM
from kdlib.objectives.kl import ForwardKL
from kdlib.types import Loss, Positions, Support
from tests.objectives.cross_cases import LAYOUT, CrossCase, check_gradients, cross_case, dense, of_sequences, random_layout

NAMES = ("kl", "reverse_kl", "cross_entropy", "total_variation", "jsd")
MERGING = 0.4  # about what half of the random chunks reach


def by_formula(name: str, p: float, q: float) -> float:
    """D of two Bernoulli distributions, from probabilities."""

    def kl(a: tuple[float, float], b: tuple[float, float]) -> float:
        return math.fsum(x * math.log(x / y) for x, y in zip(a, b, strict=True) if x > 0)

    teacher, student = (p, 1 - p), (q, 1 - q)
    middle = (0.5 * (p + q), 1 - 0.5 * (p + q))
    return {
        "kl": lambda: kl(teacher, student),
        "reverse_kl": lambda: kl(student, teacher),
        "cross_entropy": lambda: -math.fsum(x * math.log(y) for x, y in zip(teacher, student, strict=True)),
        "total_variation": lambda: abs(p - q),
        "jsd": lambda: 0.5 * (kl(teacher, middle) + kl(student, middle)),
    }[name]()


def chunk_rows(side: Positions) -> list[list[int]]:
    assert side.chunk is not None
    return [[row for row, of in enumerate(side.chunk.tolist()) if of == chunk] for chunk in range(side.chunks)]


def row_after(side: Positions, rows: list[int]) -> int | None:
    """The scored row at the chunk's last token."""
    place = (int(side.sequence[rows[-1]]), int(side.index[rows[-1]]) + 1)
    places = list(zip(side.sequence.tolist(), side.index.tolist(), strict=True))
    return places.index(place) if place in places else None


def merged_chunks(case: CrossCase, threshold: float) -> list[list[int]]:
    """Lists of neighbouring chunks, by one pass from left to right."""
    teacher = case.logp()[1].tolist()
    spaces = case.tables.spaces[1].tolist()
    sides = [(side, chunk_rows(side)) for side in (case.positions, case.other)]
    found: list[list[int]] = [[0]] if case.positions.chunks else []
    for chunk, after in pairwise(range(case.positions.chunks)):
        adjacent = all(row_after(side, rows[chunk]) == rows[after][0] for side, rows in sides)
        row = row_after(case.other, sides[1][1][chunk])
        goes_on = adjacent and sum(math.exp(x) for x, space in zip(teacher[row], spaces, strict=True) if space) <= threshold
        if goes_on:
            found[-1].append(after)
        else:
            found.append([after])
    return found


def oracle(alm: ALM, case: CrossCase) -> float:
    sides = [
        (side, chunk_rows(side), logp.tolist(), spaces.tolist())
        for side, logp, spaces in zip((case.positions, case.other), case.logp(), case.tables.spaces, strict=True)
    ]
    merged = merged_chunks(case, alm.threshold) if alm.threshold else [[chunk] for chunk in range(case.positions.chunks)]
    total = 0.0
    for group in merged:
        ends = [row_after(side, rows[group[-1]]) for side, rows, _, _ in sides]
        likelihoods = []
        for (side, rows, logp, spaces), end in zip(sides, ends, strict=True):
            value = math.fsum(logp[row][int(side.labels[row])] for chunk in group for row in rows[chunk])
            if alm.debias and None not in ends:
                value += math.log(math.fsum(math.exp(x) for x, space in zip(logp[end], spaces, strict=True) if space))
            likelihoods.append(value)
        student, teacher = (math.exp(value / alm.temperature) for value in likelihoods)
        total += len(group) * by_formula(alm.divergence, teacher, student)
    return alm.temperature * total


def loss(alm: ALM, case: CrossCase) -> Loss:
    return alm(case.student, case.teacher, case.tables)


def value_of(alm: ALM, case: CrossCase) -> float:
    return float(loss(alm, case).sum.detach())


@pytest.mark.parametrize("divergence", NAMES)
@pytest.mark.parametrize("options", [{}, {"debias": False}, {"threshold": 0.0}, {"threshold": 0.0, "debias": False}])
@pytest.mark.parametrize("temperature", [1.0, 100.0])
def test_values(divergence: str, options: dict[str, float], temperature: float) -> None:
    alm = ALM(divergence=divergence, temperature=temperature, **{"threshold": MERGING, **options})
    for seed in (0, 1):
        case = cross_case(seed=seed)
        for storage in (case, dense(case)):
            assert value_of(alm, storage) == pytest.approx(oracle(alm, case), rel=1e-9, abs=1e-12)
    assert loss(alm, case).count == case.positions.chunks == 10


@given(seed=st.integers(0, 10**6), threshold=st.floats(0.05, 0.9), debias=st.booleans())
@settings(deadline=None, max_examples=60)
def test_any_layout(seed: int, threshold: float, debias: bool) -> None:
    case = cross_case(random_layout(seed), seed=seed)
    alm = ALM(threshold=threshold, debias=debias, temperature=3.0)
    found = loss(alm, case)
    assert float(found.sum.detach()) == pytest.approx(oracle(alm, case), rel=1e-9, abs=1e-12)
    assert int(found.metrics["alm_merged"][0]) == len(merged_chunks(case, threshold))
    found.sum.backward()
    assert case.student.hidden.grad is not None
    assert case.student.hidden.grad.isfinite().all()


def test_chunks_are_merged_within_their_run() -> None:
    """At a threshold that nothing reaches, what the loose tokens, the gap and the sequences separate stays apart."""
    case = cross_case(LAYOUT)
    assert merged_chunks(case, 0.999) == [[0, 1, 2], [3, 4], [5], [6, 7, 8], [9]]
    assert float(loss(ALM(threshold=0.999), case).metrics["alm_merged"][0]) == 5
    assert 5 < len(merged_chunks(case, MERGING)) < 10  # so that the other tests merge some of them


@pytest.mark.parametrize("layout", [(((1, 1), (1, 1)),), (((1, 1),), ((1, 1),))])
@pytest.mark.parametrize("moved", ["index", "sequence"])
def test_a_border_of_two_sequences_on_one_side(layout: tuple, moved: str) -> None:
    """Rows that touch in the flattened batch, or of one sequence but apart, are not neighbours."""
    case = cross_case(layout)
    together = len(layout) == 1
    assert float(loss(ALM(threshold=0.999), case).metrics["alm_merged"][0]) == (1 if together else 2)
    if together:
        other = replace(case.other, **{moved: getattr(case.other, moved) + torch.tensor([0, 1])})
    else:
        other = replace(case.other, index=torch.tensor([0, 1]))
    student = replace(case.student, positions=replace(case.positions, other=other))
    case = replace(case, student=student)
    assert float(loss(ALM(threshold=0.999), case).metrics["alm_merged"][0]) == 2
    alm = ALM(threshold=0.999, temperature=1.0)
    assert value_of(alm, case) == pytest.approx(oracle(replace(alm, debias=False, threshold=0.0), case), rel=1e-9)


def test_a_merged_chunk_counts_as_many_times_as_it_has_chunks() -> None:
    """Three chunks of one word: the value of the whole, three times; the divisor does not depend on merging."""
    case = cross_case((((1, 2), (2, 1), (1, 1)),))
    alm = ALM(threshold=0.999, debias=False, temperature=5.0)
    student, teacher = (
        logp.gather(-1, side.labels[:, None]).sum()[None]
        for logp, side in zip(case.logp(), (case.positions, case.other), strict=True)
    )
    one = alm.on_chunk_logprobs(student, teacher)
    found = loss(alm, case)
    assert (one.count, found.count) == (1, 3)
    torch.testing.assert_close(found.sum / found.count, one.sum)


@pytest.mark.parametrize("options", [{"threshold": MERGING}, {"threshold": 0.0}, {"threshold": 0.0, "debias": False}])
@pytest.mark.parametrize("divergence", ["kl", "reverse_kl", "jsd", "cross_entropy"])
def test_gradients_through_the_head(options: dict[str, float], divergence: str) -> None:
    case = cross_case((((2, 1), (1, 2), (1, 1)), ((1, 1), (2, 1))), vocab=(5, 6), width=(3, 4))
    alm = ALM(divergence=divergence, temperature=2.0, **options)

    def value(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        student = replace(case.student, hidden=hidden, head=replace(case.student.head, weight=weight))
        return alm(student, case.teacher, case.tables).sum

    for gradient in check_gradients(value, case.student.hidden, case.student.head.weight):
        assert gradient.abs().max() > 1e-3


def test_cross_entropy_has_the_gradients_of_kl() -> None:
    case = cross_case()
    tensors = (case.student.hidden, case.student.head.weight)
    kl, entropy = (torch.autograd.grad(loss(ALM(divergence=name), case).sum, tensors) for name in ("kl", "cross_entropy"))
    for one, other in zip(kl, entropy, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("options", [{"threshold": MERGING}, {"threshold": 0.0, "debias": False}, {"hidden": 1.0}])
def test_a_batch_can_be_split(options: dict[str, float]) -> None:
    case = cross_case(width=(5, 5))
    alm = ALM(**options)
    parts = [of_sequences(case, keep) for keep in ([0, 2], [1])]
    losses = [loss(alm, part) for part in (case, *parts)]
    assert sum(one.count for one in losses[1:]) == losses[0].count
    torch.testing.assert_close(sum(one.sum for one in losses[1:]), losses[0].sum)
    if alm.hidden:
        whole, *terms = (alm.side_terms(part.student, part.teacher)["hidden"] for part in (case, *parts))
        assert whole.sum > 0
        torch.testing.assert_close(sum(term.sum for term in terms), whole.sum)


def test_of_identical_tokens_it_compares_label_with_rest() -> None:
    case = cross_case((((1, 1),) * 6,), vocab=(7, 7))
    other = replace(case.other, labels=case.positions.labels)
    case = replace(case, student=replace(case.student, positions=replace(case.positions, other=other)))
    outcomes = []
    for logp in case.logp():
        label = logp.gather(-1, other.labels[:, None])
        rest = logp.scatter(-1, other.labels[:, None], -torch.inf).logsumexp(-1, keepdim=True)
        outcomes.append(torch.cat([label, rest], -1))
    expected = ForwardKL().between(outcomes[1], outcomes[0]).sum()
    found = loss(ALM(threshold=0.0, debias=False, temperature=1.0), case).sum
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


def test_log_probs_of_the_teachers_tokens_suffice() -> None:
    case = cross_case()
    alm = ALM(threshold=0.0, debias=False)
    torch.testing.assert_close(alm(case.student, case.given()).sum, loss(alm, case).sum, rtol=0, atol=1e-12)
    assert alm.accepts == Support.FULL | Support.SAMPLED_STUDENT
    assert alm.needs == ()
    for more in ({"threshold": 0.1}, {"debias": True}):
        assert replace(alm, **more).accepts == Support.FULL
        assert replace(alm, **more).needs == ("spaces",)
    assert replace(alm, hidden=1.0).accepts == Support.FULL
    signal = case.given()
    with pytest.raises(ValueError, match="not those of the tokens"):
        alm(case.student, replace(signal, ids=signal.ids.roll(1, 0) + 1))


EXTREME = (0.0, -1e-12, -1e-7, -1e-3, -math.log(2.0), -5.0, -100.0, -1e4)


@pytest.mark.parametrize("divergence", NAMES)
@pytest.mark.parametrize("temperature", [1.0, 100.0, math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_values_and_gradients_are_finite(divergence: str, temperature: float, dtype: torch.dtype) -> None:
    if divergence == "cross_entropy" and math.isinf(temperature):
        return
    grid = torch.cartesian_prod(torch.tensor(EXTREME, dtype=dtype), torch.tensor(EXTREME, dtype=dtype))
    student = grid[:, 0].clone().requires_grad_()
    alm = ALM(divergence=divergence, temperature=temperature)
    found = alm._divergences(student, grid[:, 1])
    found.sum().backward()
    assert student.grad is not None
    assert found.isfinite().all()
    assert student.grad.isfinite().all()
    scale = 1.0 if math.isinf(temperature) else temperature
    assert (found > -1e-6 * scale).all()
    same = grid[:, 0] == grid[:, 1]
    if divergence != "cross_entropy":
        assert found[same].abs().max() <= (1e-7 * scale if divergence == "jsd" else 0)
        assert student.grad[same].abs().max() < (2.0 if divergence == "total_variation" else 1e-6)


@pytest.mark.parametrize("divergence", ["kl", "reverse_kl", "total_variation", "jsd"])
def test_small_likelihoods_keep_their_precision(divergence: str) -> None:
    """float32 against Python floats, where one minus a probability is 1e-9 to 1."""
    values = torch.tensor([-1e-6, -1e-4, -0.1, -1.0, -30.0])
    student, teacher = torch.cartesian_prod(values, values).unbind(-1)
    found = ALM(divergence=divergence, temperature=100.0)._divergences(student, teacher)
    for x, y, value in zip(teacher.tolist(), student.tolist(), found.tolist(), strict=True):
        x, y = x / 100.0, y / 100.0
        outcomes = [(math.exp(x), -math.expm1(x)), (math.exp(y), -math.expm1(y))]
        middle = tuple(0.5 * (a + b) for a, b in zip(*outcomes, strict=True))

        def kl(p: tuple[float, ...], q: tuple[float, ...]) -> float:
            return math.fsum(a * math.log1p((a - b) / b) for a, b in zip(p, q, strict=True))

        p, q = outcomes
        expected = {
            "kl": kl(p, q),
            "reverse_kl": kl(q, p),
            "total_variation": abs(p[1] - q[1]),
            "jsd": 0.5 * (kl(p, middle) + kl(q, middle)),
        }[divergence]
        assert value / 100.0 == pytest.approx(expected, rel=2e-3, abs=1e-7)


def test_a_text_that_the_teacher_finds_impossible() -> None:
    student = torch.tensor([-3.0], requires_grad=True)
    for temperature in (1.0, 100.0):
        found = ALM(temperature=temperature).on_chunk_logprobs(student, torch.tensor([-torch.inf])).sum
        assert float(found.detach()) == pytest.approx(-temperature * math.log(-math.expm1(-3.0 / temperature)), rel=1e-5)
        (gradient,) = torch.autograd.grad(found, student)
        assert gradient.isfinite().all()
        assert gradient > 0  # descent makes it less likely
    assert ALM(divergence="reverse_kl").on_chunk_logprobs(student.detach(), torch.tensor([-torch.inf])).sum == torch.inf


@pytest.mark.parametrize("divergence", ["kl", "reverse_kl", "total_variation", "jsd"])
def test_temperature_inf_is_the_limit(divergence: str) -> None:
    student = torch.tensor([-0.3, -4.0, -20.0, -2.0], dtype=torch.float64, requires_grad=True)
    teacher = torch.tensor([-0.1, -9.0, -20.0, -1e-3], dtype=torch.float64)
    limit = ALM(divergence=divergence, temperature=math.inf).on_chunk_logprobs(student, teacher).sum
    near = ALM(divergence=divergence, temperature=1e7).on_chunk_logprobs(student, teacher).sum
    torch.testing.assert_close(limit, near, rtol=1e-5, atol=1e-7)
    gradients = [torch.autograd.grad(value, student)[0] for value in (limit, near)]
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("options", [{}, {"threshold": 0.0, "debias": False}, {"hidden": 1.0}])
@pytest.mark.parametrize("layout", [((),), (((-2, -1), None),), (((-1, -1),), ())])
def test_no_chunk(options: dict[str, float], layout: tuple) -> None:
    case = cross_case(layout, width=(5, 5))
    alm = ALM(**options)
    found = [loss(alm, case), *alm.side_terms(case.student, case.teacher, case.tables).values()]
    for one in found:
        assert one.count == 0
        assert float(one.sum.detach()) == 0.0
        (gradient,) = torch.autograd.grad(one.sum, case.student.hidden)
        assert gradient.shape == case.student.hidden.shape
        assert not gradient.any()


def test_one_chunk() -> None:
    case = cross_case((((2, 3),),))
    for alm in (ALM(), ALM(threshold=0.0)):
        assert value_of(alm, case) == pytest.approx(oracle(alm, case), rel=1e-9)
        assert loss(alm, case).count == 1


# Hidden states ------------------------------------------------------------------------------------


@pytest.mark.parametrize("widths", [(5, 5), (4, 6), (6, 4)])
def test_hidden_states_at_the_last_tokens(widths: tuple[int, int]) -> None:
    case = cross_case(width=widths)
    alm = ALM(hidden=0.5)
    modules = alm.build_modules(student_width=widths[0], teacher_width=widths[1], seed=3)
    assert (modules is None) == (widths[0] == widths[1])
    hidden = case.student.hidden
    if modules is not None:
        modules = modules.double()
        hidden = hidden @ modules.weight.T
    expected = 0.0
    for mine, theirs in zip(chunk_rows(case.positions), chunk_rows(case.other), strict=True):
        rows = row_after(case.positions, mine), row_after(case.other, theirs)
        if None not in rows:
            h_s, h_t = hidden[rows[0]].tolist(), case.teacher.hidden[rows[1]].tolist()
            expected += sum((a - b) ** 2 for a, b in zip(h_s, h_t, strict=True)) / sum(b * b for b in h_t)
    found = alm.side_terms(case.student, case.teacher, replace(case.tables, modules=modules))
    assert list(found) == list(alm.side_weights) == ["hidden"]
    assert float(found["hidden"].sum.detach()) == pytest.approx(expected, rel=1e-9)
    assert found["hidden"].count == case.positions.chunks
    assert alm.side_weights == {"hidden": 0.5}


def test_the_projection_is_that_of_its_seed() -> None:
    alm = ALM(hidden=1.0)
    state = torch.get_rng_state()
    one, same, other = (alm.build_modules(student_width=3, teacher_width=5, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(state, torch.get_rng_state())
    assert torch.equal(one.weight, same.weight)
    assert not torch.equal(one.weight, other.weight)
    torch.testing.assert_close(one.weight.T @ one.weight, torch.eye(3))
    assert one.weight.dtype == torch.float32
    assert one.weight.requires_grad
    assert ALM().build_modules(student_width=3, teacher_width=5, seed=1) is None


def test_gradients_of_hidden_states() -> None:
    case = cross_case(width=(4, 6))
    alm = ALM(hidden=1.0)
    modules = alm.build_modules(student_width=4, teacher_width=6, seed=0).double()

    def value(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        module = torch.nn.Linear(4, 6, bias=False).double()

        def parametrized(states: torch.Tensor) -> torch.Tensor:
            return torch.func.functional_call(module, {"weight": weight}, (states,))

        student = replace(case.student, hidden=hidden)
        return alm.side_terms(student, case.teacher, Tables(modules=parametrized))["hidden"].sum

    assert torch.autograd.gradcheck(value, (case.student.hidden, modules.weight))


def test_hidden_states_that_are_missing() -> None:
    case = cross_case()
    assert ALM().side_terms(case.student, case.teacher) == {}
    assert ALM().side_weights == {}
    with pytest.raises(ValueError, match="5 channels, the teacher's 6: train with CrossTokenizerTrainer"):
        ALM(hidden=1.0).side_terms(case.student, case.teacher)
    with pytest.raises(ValueError, match="set hidden to 0"):
        ALM(hidden=1.0).side_terms(case.student, dense(case).teacher)


# Options ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"divergence": "log"}, "kl, reverse_kl, total_variation, jsd, cross_entropy"),
        ({"temperature": 0.0}, "temperature must be above 0"),
        ({"temperature": math.nan}, "temperature must be above 0"),
        ({"temperature": math.inf, "divergence": "cross_entropy"}, "set divergence to kl"),
        ({"threshold": 1.0}, "below 1"),
        ({"threshold": -0.1}, "at least 0"),
        ({"hidden": -1.0}, "hidden must be 0 or more"),
        ({"weight": 0.0}, "ALM.weight must be above 0"),
    ],
)
def test_options_out_of_range(options: dict[str, float], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        ALM(**options)


def test_tables_that_are_missing() -> None:
    case = cross_case()
    with pytest.raises(ValueError, match="ALM needs spaces of both sides"):
        ALM()(case.student, case.teacher)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_low_precision(dtype: torch.dtype) -> None:
    """Sums are taken in float32; bfloat16 signals are what they are, so the oracle reads the same ones."""
    case = cross_case(dtype=dtype)
    alm = ALM(threshold=MERGING, temperature=5.0)
    found = loss(alm, case).sum
    assert found.dtype == torch.float32
    assert float(found.detach()) == pytest.approx(oracle(alm, case), rel=1e-4)
