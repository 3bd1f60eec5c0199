"""Time and peak memory of Sinkhorn's loss, forward and backward, beside plain autograd, POT and the KL alone.

    python benchmarks/sinkhorn.py [--quick] [--output docs/results/sinkhorn.md]

A measurement has a process of its own: the first run gives the peak memory beyond the inputs, then come rounds of the
method and of kdlib's ForwardKL, one after the other, and ratios are taken within a round. Gradients of every method are
compared with float64 plain autograd before anything is timed. --all leaves nothing out; --device cuda times a GPU.
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing.connection import Connection
from statistics import median
from time import perf_counter, process_time
from typing import Any

import ot
import psutil
import torch
from loss import memory_in_use, peak_memory
from loss_methods import Inputs, kdlib_chunked
from page import markdown_table, write_results
from rich.console import Console
from torch import Tensor

from kdlib.kernels import linear_objective
from kdlib.objectives import Sinkhorn
from kdlib.objectives.sinkhorn import TokenPoints
from kdlib.types import Head, Positions, StudentSignal, TeacherSignal

GIB = 2**30
KL, OURS, PLAIN, POT = "KL alone", "kdlib", "plain torch", "POT"
TOLERANCE, CONVERGED = 1e-4, 200
LONGEST = 600.0  # seconds on a core; what takes longer is for a GPU
ROOM = 2 * GIB  # beyond heads and two sets of rows: what the full L1 cost may take
AIMED = (1024, 152000)
COSTS = {
    "L1": Sinkhorn(),
    "squared Euclidean": Sinkhorn(cost="sqeuclidean"),
    "L1, top 64": Sinkhorn(top_k=64),
    "sample-wise, top 32": Sinkhorn(geometry="sample", top_k=32),
}
Solver = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True, kw_only=True)
class Case:
    """A measurement: which method, of which cost, at which size."""

    method: str
    cost: str
    rows: int
    vocab: int
    widths: tuple[int, int]
    device: str
    budget: float
    seed: int

    @property
    def options(self) -> Sinkhorn:
        return replace(COSTS[self.cost], max_rows=self.rows)

    @property
    def set_of_rows(self) -> int:
        """Bytes of n x V float32."""
        return 4 * self.rows * self.vocab

    def inputs(self) -> Inputs:
        return Inputs.drawn(rows=self.rows, vocab=self.vocab, widths=self.widths, device=self.device, seed=self.seed)

    def seconds(self) -> float:
        """About what a core takes, at 40 GFLOP/s and the rates of torch.cdist: 1e9 elements a second, 2.7e9 in backward."""
        student, teacher = self.widths
        products = (8 if self.method == OURS else 6) * student + 2 * teacher
        pairs, matmuls = self.rows * self.vocab * self.rows, 3 if self.method == OURS else 2
        distances = {"L1": pairs * (1 / 1e9 + 1 / 2.7e9), "squared Euclidean": pairs * 2 * matmuls / 40e9}
        return self.rows * self.vocab * products / 40e9 + (0.0 if self.method == KL else distances.get(self.cost, 0.0))

    def bytes(self) -> int:
        """About what plain autograd keeps: tensors [n, V], what each iteration saves, the outcomes of every pair of rows."""
        plans = self.rows * (64 * 64 if self.options.geometry == "sample" else self.rows)
        pairs = 4 * self.rows**2 * 64 if self.options.geometry == "batch" and self.options.top_k else 0
        return 6 * self.set_of_rows + 4 * (4 * self.options.iterations * plans + pairs)

    def left_out(self) -> str:
        """Why it is not measured, empty if it is."""
        if self.device == "cpu" and self.seconds() > LONGEST:
            return f"for a GPU: about {self.seconds() / 60:.0f} minutes on a core"
        room = psutil.virtual_memory().available if self.device == "cpu" else torch.cuda.mem_get_info()[0]
        if self.method in (PLAIN, POT) and self.bytes() > 0.7 * room:
            return f"does not fit: about {self.bytes() / GIB:.0f} GiB"
        return ""


@dataclass(frozen=True, kw_only=True)
class Measured:
    """Seconds of each round, over those of the KL in the same round; peak bytes beyond the inputs."""

    seconds: list[float]
    to_kl: list[float]
    peak: int


def kdlib_loss(x: Inputs, options: Sinkhorn) -> Tensor:
    rows = torch.arange(len(x.hidden), device=x.hidden.device)
    positions = Positions(index=rows, labels=torch.zeros_like(rows), sequence=torch.zeros_like(rows))
    student = StudentSignal(hidden=x.hidden, head=Head(weight=x.weight), positions=positions)
    teacher = TeacherSignal(hidden=x.teacher_hidden, head=Head(weight=x.teacher_weight))
    if options.geometry == "batch":
        return options(student, teacher).sum / len(rows)
    return linear_objective(student, teacher, options.over(TokenPoints(student=x.teacher_weight)), impl="chunked").sum / len(
        rows
    )


def whole_logits(x: Inputs, options: Sinkhorn, solve: Solver) -> Tensor:
    """Textbook autograd around a solver: all logits, probabilities and costs at once."""
    q = (x.hidden @ x.weight.T / options.temperature).softmax(-1)
    with torch.no_grad():
        p = (x.teacher_hidden @ x.teacher_weight.T / options.temperature).softmax(-1)
    if options.geometry == "sample":
        return solve(*_token_problems(q, p, x.teacher_weight, options.tokens)).mean()
    mass = q.new_full((1, len(q)), 1.0 / len(q))
    return solve(_batch_costs(q, p, options)[None], mass, mass).mean()


def _batch_costs(q: Tensor, p: Tensor, options: Sinkhorn) -> Tensor:
    if options.top_k is None and options.cost == "l1":
        return torch.cdist(q, p, p=1.0)
    if options.top_k is None:
        return q.square().sum(-1)[:, None] + p.square().sum(-1) - 2.0 * q @ p.T
    likeliest, ids = p.topk(options.top_k, dim=-1)
    inside = q.index_select(1, ids.flatten()).view(len(q), *ids.shape)
    outside = (1.0 - inside.sum(-1)) - (1.0 - likeliest.sum(-1))
    return (inside - likeliest).abs().sum(-1) + outside.abs()


def _token_problems(q: Tensor, p: Tensor, vectors: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Costs [n, 2k, 2k] and masses [n, 2k] on the teacher's top k and what the student's adds to it."""
    first, second = (side.detach().topk(k, dim=-1).indices for side in (p, q))
    counted = torch.cat([torch.ones_like(first), (second[:, :, None] != first[:, None]).all(-1).long()], 1)
    ids = torch.cat([first, second], 1)
    a, b = (side.gather(1, ids) * counted for side in (q, p))
    unit = torch.nn.functional.normalize(vectors, dim=-1)[ids]
    return 1.0 - unit @ unit.mT, a / a.sum(-1, keepdim=True), b / b.sum(-1, keepdim=True)


def log_loop(options: Sinkhorn) -> Solver:
    """Sinkhorn's iterations in the log domain, as one writes them down."""

    def solve(cost: Tensor, a: Tensor, b: Tensor) -> Tensor:
        log_a, log_b, kernel = a.clamp_min(1e-30).log(), b.clamp_min(1e-30).log(), -cost / options.epsilon
        v = log_b  # potentials of zero
        for _ in range(options.iterations):
            u = log_a - (kernel + v[:, None, :]).logsumexp(2)
            v = log_b - (kernel + u[:, :, None]).logsumexp(1)
        return ((kernel + u[:, :, None] + v[:, None, :]).exp() * cost).sum((1, 2))

    return solve


def pot(options: Sinkhorn) -> Solver:
    """POT's solver through autograd: rows and columns change places in ``sinkhorn2``, which begins with the columns."""

    def solve(cost: Tensor, a: Tensor, b: Tensor) -> Tensor:
        if len(cost) > 1:
            given = {"reg": options.epsilon, "max_iter": options.iterations, "tol": 0.0, "grad": "autodiff"}
            solved = ot.solve_batch(cost, a=a.clamp_min(1e-30), b=b.clamp_min(1e-30), method="log_sinkhorn", **given)
            return solved.value_linear
        given = {"method": "sinkhorn_log", "numItermax": options.iterations, "stopThr": 0.0, "warn": False}
        return ot.sinkhorn2(b[0], a[0], cost[0].T, options.epsilon, **given)

    return solve


def loss(method: str, x: Inputs, options: Sinkhorn) -> Tensor:
    if method == KL:
        return kdlib_chunked(x, 0.0)
    if method == OURS:
        return kdlib_loss(x, options)
    return whole_logits(x, options, (log_loop if method == PLAIN else pot)(options))


def gradients(method: str, x: Inputs, options: Sinkhorn) -> tuple[Tensor, Tensor]:
    """Forward and backward; the gradients of the student's hidden states and weight."""
    loss(method, x, options).backward()
    found = x.hidden.grad, x.weight.grad
    x.hidden.grad = x.weight.grad = None
    assert found[0] is not None and found[1] is not None
    return found[0], found[1]


def gradient_error(case: Case) -> float:
    """Relative (Frobenius) error of the worse float32 gradient against float64 plain autograd, at a small size.

    After as many iterations as converge: POT starts elsewhere where masses are not uniform.
    """
    small = replace(case, rows=96, vocab=512, widths=(32, 48))
    x, options = small.inputs(), replace(small.options, iterations=CONVERGED)
    exact = gradients(PLAIN, x.double(), options)
    found = gradients(case.method, x, options)
    return max(((a.double() - b).norm() / b.norm()).item() for a, b in zip(found, exact, strict=True))


def worker(pipe: Connection, measurement: Callable[[], Any]) -> None:
    """The process of a measurement: sends what it found, or what went wrong."""
    try:
        pipe.send(measurement())
    except (RuntimeError, ValueError) as error:
        pipe.send(error)


def rounds(case: Case) -> Measured:
    """The method, then the KL, until the budget is spent; the first run of the method is the one whose peak counts."""
    x, seconds, to_kl, peak = case.inputs(), [], [], 0
    torch.mm(x.teacher_hidden[: x.chunk], x.teacher_weight.T)  # BLAS workspaces and threads are of no method
    end = perf_counter() + case.budget
    while not seconds or perf_counter() < end:
        before = memory_in_use(case.device)
        seconds.append(timed(case.method, x, case))
        peak = peak or peak_memory(case.device) - before
        to_kl.append(1.0 if case.method == KL else seconds[-1] / timed(KL, x, case))
    return Measured(seconds=seconds, to_kl=to_kl, peak=peak)


def timed(method: str, x: Inputs, case: Case) -> float:
    """CPU seconds, so that other work on the machine does not count; wall seconds on a GPU."""
    clock = process_time if case.device == "cpu" else perf_counter
    start = clock()
    gradients(method, x, case.options)
    if case.device == "cuda":
        torch.cuda.synchronize()
    return clock() - start


def apart(measurement: Callable[[], Any], *, device: str) -> Any:
    """What it finds in a process of its own; raises what went wrong there."""
    # forked, so that the imports happen once: this process has not computed anything yet, nor will it
    forked = device == "cpu" and sys.platform == "linux"
    context = multiprocessing.get_context("fork" if forked else "spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=worker, args=(theirs, measurement), daemon=True)
    process.start()
    theirs.close()
    try:
        found = ours.recv()
    except EOFError:  # the system ends processes that want too much memory without a word
        found = MemoryError(f"the process of {measurement} was ended")
    process.join()
    if isinstance(found, Exception):
        raise found
    return found


HEAD = ("cost", "method", "seconds", "x KL", "kdlib takes", "peak GiB", "beyond two sets of rows, GiB")


def line(case: Case, found: Measured, ours: Measured | None) -> tuple[str, ...]:
    """ "kdlib takes" is kdlib's time, in KLs of its own rounds, over the method's."""
    if case.method == KL:
        return (KL, "kdlib", f"{median(found.seconds):.2f}", "1.00", "", f"{found.peak / GIB:.2f}", "")
    taken = "" if ours is None else f"{median(ours.to_kl) / median(found.to_kl):.2f}x"
    beyond = max(0.0, (found.peak - 2 * case.set_of_rows) / GIB)
    time = (f"{median(found.seconds):.2f}", f"{median(found.to_kl):.2f}", taken)
    return (case.cost, case.method, *time, f"{found.peak / GIB:.2f}", f"{beyond:.2f}")


def aim(case: Case, peak: int) -> str:
    beyond = peak - 2 * case.set_of_rows
    return (
        f"- {case.cost}: peak {peak / GIB:.2f} GiB, less two sets of rows ({2 * case.set_of_rows / GIB:.2f} GiB) "
        f"{beyond / GIB:.2f} GiB: at most 2 GiB is {'met' if beyond <= ROOM else 'missed'}."
    )


def cases(given: argparse.Namespace, rows: int, vocab: int) -> list[Case]:
    """Of one size, each cost's methods after the KL."""
    size = {"rows": rows, "vocab": vocab, "widths": tuple(given.widths), "device": given.device, "seed": given.seed}
    named = [(KL, "L1"), *((method, cost) for cost in given.costs for method in (OURS, PLAIN, POT))]
    return [Case(method=method, cost=cost, budget=given.seconds, **size) for method, cost in named]


def of_gradients(given: argparse.Namespace) -> str:
    """The errors of all gradients as markdown; ValueError for wrong ones."""
    errors = {}
    for case in cases(given, given.rows[0], given.vocab[0])[1:]:
        errors[case.method, case.cost] = apart(partial(gradient_error, case), device=case.device)
    for (method, cost), error in errors.items():
        if error > TOLERANCE:
            raise ValueError(f"{method}: the gradients of {cost} are off by {error:.1e}")
    lines = [(method, *(f"{errors[method, cost]:.0e}" for cost in given.costs)) for method in (OURS, PLAIN, POT)]
    return "## Gradients: error against float64\n\n" + markdown_table(("method", *given.costs), lines)


def of_size(given: argparse.Namespace, rows: int, vocab: int, console: Console) -> tuple[str, list[str]]:
    """The table of a size as markdown, and what came of the aims there."""
    lines, aims, ours = [], [], None
    for case in cases(given, rows, vocab):
        reason = "" if given.all else case.left_out()
        found = None if reason else apart(partial(rounds, case), device=case.device)
        ours = found if case.method == OURS else ours
        if found is None:
            lines.append((case.cost, case.method, reason, *("",) * (len(HEAD) - 3)))
        else:
            lines.append(line(case, found, ours))
        if found is not None and case.method == OURS and (rows, vocab) == AIMED:
            aims.append(aim(case, found.peak))
        console.print(f"n = {rows}, V = {vocab}:", *lines[-1], sep=" | ")
    return f"## n = {rows}, V = {vocab}\n\n" + markdown_table(HEAD, lines), aims


@dataclass(frozen=True, kw_only=True)
class Iterations:
    """A measurement of the iterations alone, on costs [n, n] that are given: seconds of forward and of both, peak bytes."""

    by: str
    rows: int
    device: str
    seed: int

    def __call__(self) -> tuple[float, float, int]:
        generator = torch.Generator(self.device).manual_seed(self.seed)
        cost = torch.rand(self.rows, self.rows, device=self.device, generator=generator).requires_grad_()
        clock, before = (process_time if self.device == "cpu" else perf_counter), memory_in_use(self.device)
        start = clock()
        value = self.value(cost)
        value.item()  # waits for a GPU
        forward = clock() - start
        value.backward()
        if self.device == "cuda":
            torch.cuda.synchronize()
        return forward, clock() - start, peak_memory(self.device) - before

    def value(self, cost: Tensor) -> Tensor:
        options, mass = Sinkhorn(), cost.new_full((1, self.rows), 1.0 / self.rows)
        if self.by in (PLAIN, POT):
            return (log_loop if self.by == PLAIN else pot)(options)(cost[None], mass, mass).sum()
        return replace(options, loss=self.by.split()[-1]).solve(cost, mass[0].log(), mass[0].log()).value  # type: ignore[arg-type]


def of_iterations(given: argparse.Namespace, console: Console) -> str:
    """The table of the iterations alone."""
    lines = []
    for rows in given.rows:
        for by in (f"{OURS}, transport", f"{OURS}, dual", PLAIN, POT):
            forward, both, peak = apart(Iterations(by=by, rows=rows, device=given.device, seed=given.seed), device=given.device)
            lines.append((by, str(rows), f"{forward:.2f}", f"{both:.2f}", f"{peak / GIB:.2f}"))
            console.print(*lines[-1], sep=" | ")
    head = ("iterations alone", "n", "seconds, forward", "seconds, with backward", "peak GiB")
    return f"## {Sinkhorn().iterations} iterations on given costs [n, n]\n\n" + markdown_table(head, lines)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[256, 1024, 4096], help="n")
    parser.add_argument("--vocab", type=int, nargs="+", default=[32000, 152000], help="V")
    parser.add_argument("--widths", type=int, nargs=2, default=[512, 1024], help="hidden widths: student, teacher")
    parser.add_argument("--costs", nargs="+", default=list(COSTS), choices=list(COSTS))
    parser.add_argument("--seconds", type=float, default=10.0, help="for the rounds of a method; one is made anyway")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--all", action="store_true", help="leave out nothing for its time or memory")
    parser.add_argument("--output", help="write the tables as Markdown to this file")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to see that it runs")
    given = parser.parse_args()
    if given.quick:
        given.rows, given.vocab, given.widths, given.seconds = [80], [512], [32, 48], 0.0
    return given


def notes(given: argparse.Namespace) -> list[str]:
    """What was run, and how to read the tables."""
    clock = "CPU seconds" if given.device == "cpu" else "Seconds"
    options, (student, teacher) = Sinkhorn(), given.widths
    return [
        f"Forward and backward of the transport alone, from hidden states (widths {student} and {teacher}) and heads to the "
        f"gradients of the student's, float32; epsilon {options.epsilon:g}, {options.iterations} iterations, temperature "
        f"{options.temperature:g}, seed {given.seed}; POT {ot.__version__}.",
        f"{clock} are medians over rounds; x KL: over the time of kdlib's ForwardKL in the same round; kdlib takes: kdlib's "
        "x KL over the method's. Peak: growth of a fresh process beyond heads and hidden states (their gradients are in it). "
        "A set of rows is n x V float32. Gradients are compared with float64 plain autograd at n = 96, V = 512, "
        f"{CONVERGED} iterations.",
        "Plain torch has all logits at once, torch.cdist or its equal, and the iterations in the log domain; POT is the same "
        "with its solver (sinkhorn2 with sinkhorn_log, solve_batch) in their place.",
    ]


def page(given: argparse.Namespace, tables: list[str], aims: list[str]) -> list[str]:
    """The paragraphs of the page."""
    met = ["## Memory at n = {}, V = {}\n\n".format(*AIMED) + "\n".join(aims)] if aims else []
    return [*notes(given), *met, *tables]


def main() -> None:
    given, console = arguments(), Console(width=160)
    tables, aims = [of_gradients(given), of_iterations(given, console)], []
    sizes = [(rows, vocab) for rows in given.rows for vocab in given.vocab]
    for rows, vocab in sorted(sizes, key=lambda size: size[0] ** 2 * size[1]):  # the long ones last
        table, found = of_size(given, rows, vocab, console)
        tables.append(table)
        aims += found
        if given.output:  # after every size: the whole takes an hour or more
            write_results(given.output, title="Sinkhorn's loss: time and memory", parts=page(given, tables, aims))
    console.print(*aims, sep="\n")


if __name__ == "__main__":
    main()
