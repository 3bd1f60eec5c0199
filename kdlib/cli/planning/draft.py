"""``kdlib plan draft``: untrained drafts of several shapes timed against a target, and the acceptance each would need."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from kdlib.cli.parsing import parse

DESCRIPTION = """Times untrained drafts of several shapes against a target, and says which acceptance each needs to make
generation faster, before anything is trained.

Passes are those of transformers in this process; a server's differ, so measure the one you will use (kdlib evaluate
acceptance --server). Sampling is not counted. The model and what it leaves out: docs/plan_draft.md."""
ALPHAS = (0.6, 0.7, 0.8, 0.9)


@dataclass
class PlanDraftArguments:
    """What is timed, and where.

    Args:
        target: a path or Hub id.
        target_random: build the target, and every draft, from configurations with random weights; nothing is loaded.
        candidates: shapes, a list of {num_hidden_layers: 2, hidden_size: 512} (changes to the target's configuration), {prune: [0, 8]} (these layers of the target) or {path: DIR_OR_ID}; left out, an eighth, a quarter and half of its layers.
        context: tokens in the cache when a pass begins.
        batch_sizes: rows decoded at a time.
        num_speculative_tokens: drafted tokens per round, gamma.
        repeats: measurements, of which the median counts.
        dtype: auto (as saved), float32, bfloat16 or float16.
        device: cpu, cuda or cuda:N; chosen when left out.
        output_path: write the plan as JSON to this file or directory.
    """  # noqa: E501 (an option's text is one line)

    target: str
    target_random: bool = False
    candidates: list[dict[str, Any]] | None = None
    context: int = 512
    batch_sizes: list[int] = field(default_factory=lambda: [1, 8])
    num_speculative_tokens: list[int] = field(default_factory=lambda: [2, 3, 5])
    repeats: int = 20
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    device: str | None = None
    output_path: str | None = None

    def __post_init__(self) -> None:
        for name, values in (("batch_sizes", self.batch_sizes), ("num_speculative_tokens", self.num_speculative_tokens)):
            if not values or min(values) < 1:
                raise ValueError(f"{name} are whole numbers of at least 1, not {values}")
        if self.repeats < 1:
            raise ValueError(f"repeats is at least 1, not {self.repeats}")


def run(words: list[str]) -> int:
    options = parse("plan draft", DESCRIPTION, [PlanDraftArguments], words)
    if options is None:
        return 0
    arguments = options.build(PlanDraftArguments)
    console = Console(soft_wrap=True, highlight=False)
    plan = plan_draft(arguments, log=Console(stderr=True, soft_wrap=True, highlight=False))
    for line in _shown(plan):
        console.print(line, markup=False)
    if arguments.output_path:
        from kdlib.eval import write_results

        console.print(f"written {write_results(plan, arguments.output_path, name='plan_draft')}", markup=False)
    return 0


def plan_draft(arguments: PlanDraftArguments, *, log: Console) -> dict[str, Any]:
    """Costs of every candidate at every batch size, and what follows from them; JSON as it is."""
    import torch

    from kdlib.cli.planning.shapes import built, shapes
    from kdlib.models import parameter_count

    device = torch.device(arguments.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    make = partial(built, random=arguments.target_random, dtype=arguments.dtype, device=device)
    target = make(arguments.target)
    candidates = []
    for shape in shapes(target.config.get_text_config(), arguments.candidates):
        log.print(f"timing {shape.name}", markup=False)
        draft = make(shape.source)
        entry = {"name": shape.name, "candidate": shape.asked, "parameters": parameter_count(draft)}
        sizes = [_costs(target, draft, arguments, batch_size=size) for size in arguments.batch_sizes]
        candidates.append({**entry, "vocab_size": draft.config.get_text_config().vocab_size, "batch_sizes": sizes})
        del draft
    return {
        "target": arguments.target,
        "parameters": parameter_count(target),
        "vocab_size": target.config.get_text_config().vocab_size,
        "device": str(device) if device.type == "cpu" else torch.cuda.get_device_name(device),
        "threads": torch.get_num_threads(),
        "dtype": str(target.dtype).removeprefix("torch."),
        "attention": target.config._attn_implementation,
        "context": arguments.context,
        "repeats": arguments.repeats,
        "alphas": list(ALPHAS),
        "candidates": candidates,
    }


def _costs(target: Any, draft: Any, arguments: PlanDraftArguments, *, batch_size: int) -> dict[str, Any]:
    from kdlib.eval.costs import measure_costs

    gammas = sorted(set(arguments.num_speculative_tokens))
    sizes = {"context": arguments.context, "batch_size": batch_size, "repeats": arguments.repeats}
    costs = measure_costs(target, draft, gammas=gammas, **sizes)
    return {
        "batch_size": batch_size,
        "target_step_seconds": costs.target_step,
        "draft_step_seconds": costs.draft_step,
        **consequences(c=costs.c, v=costs.v),
    }


def consequences(*, c: float, v: Mapping[int, float]) -> dict[str, Any]:
    """What the wall-time model says of a draft of cost c and verification {gamma: v}; ``alpha`` is the chance that a drafted
    token is accepted, the same at every position. None where no alpha pays, and where no gamma does.
    """
    from kdlib.eval.speedup import best_gamma, break_even_acceptance, iid_acceptance_length, speedup

    rows = []
    for gamma, verify in v.items():
        faster = {str(a): speedup(iid_acceptance_length(a, gamma=gamma), gamma=gamma, c=c, v=verify) for a in ALPHAS}
        rows.append(
            {
                "num_speculative_tokens": gamma,
                "v": verify,
                "break_even_acceptance_length": gamma * c + verify,
                "break_even_alpha": break_even_acceptance(c=c, v=verify, gamma=gamma),
                "speedup": faster,
            }
        )
    found = {str(a): best_gamma(a, c=c, v=v, gammas=v) for a in ALPHAS}
    best = {alpha: gamma if value > 1 else None for alpha, (gamma, value) in found.items()}
    can_pay = c < 1 and any(row["break_even_alpha"] is not None for row in rows)
    return {"c": c, "can_pay": can_pay, "rows": rows, "best_num_speculative_tokens": best}


def _shown(plan: Mapping[str, Any]) -> Iterator[Any]:
    """A table for every shape, and a line where something is to be said about it."""
    threads = f", {plan['threads']} threads" if plan["device"] == "cpu" else ""
    yield (
        f"target {plan['target']}: {plan['parameters']:,} parameters, {plan['dtype']}, {plan['attention']} attention, "
        f"{plan['device']}{threads}; passes at {plan['context']} cached tokens, medians of {plan['repeats']}"
    )
    for candidate in plan["candidates"]:
        share = candidate["parameters"] / plan["parameters"]
        yield f"\n{candidate['name']}: {candidate['parameters']:,} parameters, {share:.0%} of the target's"
        yield _table(candidate, alphas=plan["alphas"])
        yield from _remarks(candidate, plan["vocab_size"])
    yield (
        "\ngamma: num_speculative_tokens. c: a step of the draft, v: verification of gamma + 1 tokens, in steps of the target. "
        "needs: alpha (chance that a drafted token is accepted) and acceptance_length (tokens per round, with the bonus token) "
        "at which it breaks even. x: speed-up at that alpha, * the best gamma where one pays."
    )


def _table(candidate: Mapping[str, Any], *, alphas: Sequence[float]) -> Table:
    table = Table(box=SIMPLE_HEAD)
    names = ("batch", "gamma", "c", "v", "needs\nalpha", "needs\nlength")
    for name in (*names, *(f"x at\n{alpha}" for alpha in alphas)):
        table.add_column(name, justify="right", no_wrap=True)
    for size in candidate["batch_sizes"]:
        for row in size["rows"]:
            batch, c = [str(size["batch_size"]), f"{size['c']:.2f}"] if row is size["rows"][0] else ["", ""]
            table.add_row(batch, str(row["num_speculative_tokens"]), c, *_cells(row, size))
    return table


def _cells(row: Mapping[str, Any], size: Mapping[str, Any]) -> list[str]:
    alpha, gamma, best = row["break_even_alpha"], row["num_speculative_tokens"], size["best_num_speculative_tokens"]
    faster = [f"{value:.2f}{'*' if best[a] == gamma else ' '}" for a, value in row["speedup"].items()]
    needs = "none" if alpha is None else f"{alpha:.2f}"
    return [f"{row['v']:.2f}", needs, f"{row['break_even_acceptance_length']:.2f}", *faster]


def _remarks(candidate: Mapping[str, Any], vocab_size: int) -> Sequence[str]:
    name, lines = candidate["name"], []
    for size in candidate["batch_sizes"]:
        if not size["can_pay"]:
            why = "a step of it takes as long as one of the target" if size["c"] >= 1 else "no acceptance makes up for its cost"
            lines.append(f"{name} cannot pay at batch size {size['batch_size']}: {why} (c = {size['c']:.2f})")
    if candidate["vocab_size"] != vocab_size:
        sizes = f"{candidate['vocab_size']:,} entries, the target's {vocab_size:,}"
        lines.append(f"{name} has a vocabulary of {sizes}: vLLM takes it with use_heterogeneous_vocab alone")
    return lines
