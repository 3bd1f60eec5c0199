"""Time and peak memory of the linear distillation loss, forward and backward, beside other implementations.

    python benchmarks/loss.py [--quick] [--output docs/results/loss.md]

Every method has a process of its own. Its first run measures the peak memory beyond the inputs; then come
rounds in which the methods and the bare matrix products (the floor) run one after the other, and ratios are
taken within a round, so that a machine with other work slows both sides. Gradients are checked against
float64 before anything is timed.
"""

from __future__ import annotations

import argparse
import ctypes
import multiprocessing
import os
import platform
import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from time import perf_counter, process_time

import psutil
import torch
from loss_methods import BETAS, METHODS, Inputs, MatrixProducts, gradient_error, gradients
from rich.console import Console
from rich.table import Table

FLOOR, OURS = "floor", "kdlib chunked"
LARGE = 100_000  # V from which Liger runs at one chunk size only, the faster one, to save minutes
TOLERANCE = 1e-5
MB = 1e6


@dataclass(frozen=True, kw_only=True)
class Case:
    """One table: sizes, objective, and how long its rounds may take."""

    objective: str
    rows: int
    vocab: int
    widths: tuple[int, int]
    seconds: float
    threads: int
    cpu_time: bool
    device: str
    seed: int

    def inputs(self) -> Inputs:
        return Inputs.drawn(rows=self.rows, vocab=self.vocab, widths=self.widths, device=self.device, seed=self.seed)

    def formula(self, chunk: int) -> int:
        """Bytes: two chunks of logits, the gradient of the weight and that of the hidden states."""
        width = self.widths[0]
        return 4 * (2 * chunk * self.vocab + self.vocab * width + self.rows * width)

    def methods(self) -> list[str]:
        """Those that fit: the naive one keeps about 14 tensors [N, V]."""
        room = 14 * 4 * self.rows * self.vocab < psutil.virtual_memory().available or self.device == "cuda"
        left_out = {"naive": not room, "Liger": self.vocab >= LARGE}
        return [name for name in METHODS if not left_out.get(name, False)]


@dataclass
class Measured:
    """Of one method: seconds (and over the floor's) of each round; peak bytes; error of the gradients."""

    seconds: list[float] = field(default_factory=list)
    to_floor: list[float] = field(default_factory=list)
    peak: int = 0
    error: float = 0.0


def worker(pipe: Connection, method: str, case: Case) -> None:
    """A method's process: runs when asked, answers (seconds, peak bytes, gradient error, c or FLOPs)."""
    torch.set_num_threads(case.threads)
    error = 0.0 if method == FLOOR else gradient_error(method, case.objective, device=case.device, seed=case.seed)
    x, clock = case.inputs(), process_time if case.cpu_time else perf_counter
    floor = MatrixProducts(x) if method == FLOOR else None
    torch.mm(x.teacher_hidden[: x.chunk], x.teacher_weight.T)  # BLAS workspaces and threads are of no method

    def run() -> None:
        floor() if floor else gradients(method, x, case.objective)
        if case.device == "cuda":
            torch.cuda.synchronize()

    pipe.send("ready")
    while pipe.recv():
        before, start = memory_in_use(case.device), clock()
        run()
        seconds = clock() - start
        pipe.send((seconds, peak_memory(case.device) - before, error, floor.flops if floor else x.chunk))


def memory_in_use(device: str) -> int:
    """Bytes in use now, what the allocator holds back given up first."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    if sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)
    return psutil.Process().memory_info().rss


def peak_memory(device: str) -> int:
    """Bytes in use at most: of all time for CPU, so that a process's first run is the one that measures."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


@contextmanager
def workers(case: Case) -> Iterator[dict[str, Connection]]:
    """A pipe to each method's process, all of them ready and idle."""
    # forked, so that the imports happen once: this process has not computed anything yet, nor will it
    forked = case.device == "cpu" and sys.platform == "linux"
    context = multiprocessing.get_context("fork" if forked else "spawn")
    pipes, processes = {}, []
    for method in (FLOOR, *case.methods()):
        pipes[method], theirs = context.Pipe()
        processes.append(context.Process(target=worker, args=(theirs, method, case), daemon=True))
        processes[-1].start()
        theirs.close()
    for pipe in pipes.values():
        pipe.recv()
    yield pipes
    for pipe, process in zip(pipes.values(), processes, strict=True):
        pipe.send(False)
        process.join()


def measure(case: Case) -> tuple[dict[str, Measured], float, int]:
    """What each method needs, the floor's FLOPs per second, kdlib's c; ValueError for wrong gradients."""
    with workers(case) as pipes:
        first = {name: _ask(pipe) for name, pipe in pipes.items()}
        found = {name: Measured(peak=peak, error=error) for name, (_, peak, error, _) in first.items()}
        for name, of in found.items():
            if of.error > TOLERANCE:
                raise ValueError(f"{name}: the gradients of {case.objective} are off by {of.error:.1e}")
        end = perf_counter() + case.seconds
        while not found[OURS].seconds or perf_counter() < end:
            seconds = {name: _ask(pipe)[0] for name, pipe in pipes.items()}
            for name, of in found.items():
                of.seconds.append(seconds[name])
                of.to_floor.append(seconds[name] / seconds[FLOOR])
    return found, first[FLOOR][3] / median(found[FLOOR].seconds), first[OURS][3]


def _ask(pipe: Connection) -> tuple[float, int, float, int]:
    pipe.send(True)
    return pipe.recv()


COLUMNS = (
    "method",
    "seconds",
    "fastest",
    "x floor",
    "kdlib takes",
    "peak MB",
    "x formula",
    "kdlib needs",
    "error",
)


def table(case: Case, found: dict[str, Measured], chunk: int) -> list[tuple[str, ...]]:
    """A line for each method; "kdlib takes" and "needs" are kdlib's time and memory over the method's."""
    ours, formula, lines = found[OURS], case.formula(chunk), []
    for name, of in found.items():
        time = (f"{median(of.seconds):.2f}", f"{min(of.seconds):.2f}", f"{median(of.to_floor):.2f}")
        taken = median(a / b for a, b in zip(ours.seconds, of.seconds, strict=True))
        memory = (
            f"{of.peak / MB:.0f}",
            f"{of.peak / formula:.2f}",
            f"{ours.peak / of.peak:.2f}x",
            f"{of.error:.0e}",
        )
        lines.append((name, *time, f"{taken:.2f}x", *(("", "", "", "") if name == FLOOR else memory)))
    return lines


def aims(found: dict[str, Measured], case: Case, chunk: int) -> str:
    """The aims of the kernel and what came of them."""
    ours = found[OURS]
    to_floor, to_memory = median(ours.to_floor), ours.peak / case.formula(chunk)
    to = {name: median(a / b for a, b in zip(ours.seconds, of.seconds, strict=True)) for name, of in found.items()}
    to_trl, to_liger = to["TRL"], max(to[name] for name in found if name.startswith("Liger"))
    checks = (
        (f"at most 1.15x the floor: {to_floor:.2f}x", to_floor <= 1.15),
        (f"at most 0.45x TRL's time: {to_trl:.2f}x", to_trl <= 0.45),
        (f"below Liger's time (its faster run): {to_liger:.2f}x", to_liger < 1.0),
        (f"memory within 10% of the formula: {to_memory:.2f}x", abs(to_memory - 1.0) <= 0.1),
    )
    return "; ".join(f"{text} ({'met' if met else 'missed'})" for text, met in checks) + "."


def report(case: Case, console: Console, *, judged: bool) -> str:
    """Measures a case, prints its table (and what came of the aims, if ``judged``), gives it as markdown."""
    found, rate, chunk = measure(case)
    title = f"{case.objective}, V = {case.vocab}"
    student, teacher = case.widths
    note = (
        f"N = {case.rows}, D = {student} (student) and {teacher} (teacher), float32, c = {chunk}; "
        f"rounds: {len(found[OURS].seconds)}, {'CPU' if case.cpu_time else 'wall'} time; floor at {rate / 1e9:.0f} GFLOP/s; "
        f"formula {case.formula(chunk) / MB:.0f} MB."
    )
    outcome = f"Aims: {aims(found, case, chunk)}" if judged else "Too small to judge by."
    lines = table(case, found, chunk)
    shown = Table(*COLUMNS, title=title)
    for line in lines:
        shown.add_row(*line)
    console.print(shown, note, outcome, "", sep="\n")
    grid = "\n".join("| " + " | ".join(line) + " |" for line in [COLUMNS, ("---",) * len(COLUMNS), *lines])
    return f"## {title}\n\n{note}\n\n{grid}\n\n{outcome}\n"


def machine(device: str, threads: int) -> str:
    """The class of machine, nothing that names it."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.machine()}, {os.cpu_count()} cores, threads: {threads}"


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=2048, help="N, scored positions")
    parser.add_argument("--vocab", type=int, nargs="+", default=[32000, 128000], help="V")
    parser.add_argument("--widths", type=int, nargs=2, default=[512, 1024], help="hidden widths: student, teacher")
    parser.add_argument("--seconds", type=float, default=40.0, help="for the rounds of a table; one is made anyway")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--cpu-time", action="store_true", help="CPU seconds, for machines with other work")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="also write the tables to this markdown file")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to see that it runs")
    given = parser.parse_args()
    if given.quick:
        given.rows, given.vocab, given.widths, given.seconds = 300, [512], [32, 48], 0.0
    return given


def heading(given: argparse.Namespace) -> str:
    """What was run, with what, on what kind of machine, and how to read the tables."""
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "trl", "liger-kernel"))
    command = " ".join(["python benchmarks/loss.py", *sys.argv[1:]])
    return (
        "# Linear distillation loss: time and memory\n\n"
        f"`{command}`, seed {given.seed}; {versions}, Python {platform.python_version()}; "
        f"{machine(given.device, given.threads)}.\n\n"
        "Forward and backward of the mean divergence of N rows. The floor is the four matrix products,\n"
        "the formula 2cV + VD + ND floats (D of the student). `kdlib takes` and `kdlib needs` are kdlib's\n"
        "time and memory over those of the method. Seconds are medians over rounds, ratios medians of the\n"
        "ratios within a round; memory is the growth beyond the inputs in a fresh process; error is that\n"
        "of the gradients against float64, at a small size.\n"
    )


def main() -> None:
    given = arguments()
    console, parts = Console(width=110), [heading(given)]
    for vocab in given.vocab:
        for objective in BETAS:
            case = Case(
                objective=objective,
                rows=given.rows,
                vocab=vocab,
                widths=tuple(given.widths),
                seconds=given.seconds,
                threads=given.threads,
                cpu_time=given.cpu_time,
                device=given.device,
                seed=given.seed,
            )
            parts.append(report(case, console, judged=not given.quick))
    if given.output:
        given.output.parent.mkdir(parents=True, exist_ok=True)
        given.output.write_text("\n".join(parts))


if __name__ == "__main__":
    main()
