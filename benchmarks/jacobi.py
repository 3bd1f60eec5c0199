"""Tokens per forward pass before and after consistency training, at equal training tokens: GSM8K, 4.2M-parameter model.

python benchmarks/jacobi.py --seeds 0 1 2 --output docs/results/jacobi.md
--quick trains one method for a few steps, to see that the script works.

The model writes its greedy answers and their Jacobi states once. For every seed each method trains it on them, for as many
steps as read the tokens that --steps steps of CLLM read. Finished runs and measurements are left alone: delete them in --runs
after changing options here.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from itertools import groupby
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from jacobi_runs import BLOCK, METHODS, PLAIN, ROOT, seen_tokens, trained_at_equal_tokens, write_trajectories
from page import markdown_table, write_results
from rich.console import Console
from rich.table import Table

from kdlib.data import load_rows
from kdlib.eval import bits_per_byte, jacobi
from kdlib.eval.plots import line_plot
from kdlib.files import write_whole
from kdlib.models import load_model, load_tokenizer

DATA, MODEL = ROOT / "../shared/data/gsm8k", ROOT / "../shared/models/gsm8k-lm"
LONGEST = 384
TOKENS_PER_FORWARD, LOSS = 1.5, 0.02  # the aims
COMMON: dict[str, Any] = {
    "learning_rate": 1e-4,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 0.1,
    "per_device_train_batch_size": 8,
    "ar_labels": "dataset",
    "ar_weight": 10.0,
}
RECYCLING: dict[str, Any] = {"sliding_window": True, "pool": 16, "timing": False}  # lossless too, more rows in each pass
BASE = "before training"
DEFAULT = [*METHODS][:3]
Found = dict[str, Any]


class Measure:
    """Jacobi decoding of the same test questions, and bits per byte of the same test answers."""

    def __init__(self, rows: Path, *, prompts: int, text_rows: int, max_new_tokens: int) -> None:
        self.tokenizer, self.rows = load_tokenizer(str(MODEL)), load_rows(str(rows))
        self.prompts, self.text_rows, self.max_new_tokens = prompts, text_rows, max_new_tokens

    def __call__(self, model: Path, *, beside: Path) -> Found:
        """The scores of a model, measured once and kept ``beside`` it."""
        kept = beside / f"measured-{self.prompts}-{self.text_rows}-{self.max_new_tokens}.json"
        if not kept.is_file():
            beside.mkdir(parents=True, exist_ok=True)
            write_whole(kept, json.dumps(self.measured(model)))
        found: Found = json.loads(kept.read_text())
        return found

    def measured(self, path: Path) -> Found:
        model = load_model(str(path))
        decoded, recycled = (
            jacobi(
                model,
                self.rows.select(range(self.prompts)),
                tokenizer=self.tokenizer,
                block_size=BLOCK,
                max_new_tokens=self.max_new_tokens,
                batch_size=16,
                resamples=100,
                **options,
            )
            for options in ({}, RECYCLING)
        )
        text = bits_per_byte(
            model, self.rows.select(range(self.text_rows)), tokenizer=self.tokenizer, batch_size=16, max_length=LONGEST
        )
        return {**decoded.to_json(), "recycled": recycled.to_json(), "bits_per_byte": text.bits_per_byte}


# column: how it is written, and its number in what was measured of a model, with what was measured before training
Number = Callable[[Found, Found], float]
COLUMNS: dict[str, tuple[str, Number]] = {
    "tokens per forward": (".3f", lambda one, base: one["tokens_per_forward"]["value"]),
    "with recycling": (".3f", lambda one, base: one["recycled"]["tokens_per_forward"]["value"]),
    "iterations per block": (".2f", lambda one, base: one["iterations_per_block"]["value"]),
    "fast-forwarded": (".2f", lambda one, base: one["trajectories"]["fast_forwarded"]["value"]),
    "stationary": (".2f", lambda one, base: one["trajectories"]["stationary"]["value"]),
    "bits per byte": (".4f", lambda one, base: one["bits_per_byte"]),
    "change": ("+.2%", lambda one, base: one["bits_per_byte"] / base["bits_per_byte"] - 1),
    "against greedy": (".2f", lambda one, base: one["timing"]["speedup"]["value"]),
}
HEAD = ["model", *COLUMNS, "greedy tokens", "tokens read"]


def table_rows(found: Mapping[str, list[Found]]) -> list[list[str]]:
    """A row for each method: mean ± standard deviation over seeds; HEAD names the columns."""
    base = found[BASE][0]
    rows = []
    for name, seeds in found.items():
        row = [name]
        for form, number in COLUMNS.values():
            values = [number(one, base) for one in seeds]
            spread = f" ± {stdev(values):{form.lstrip('+')}}" if len(values) > 1 else ""
            row.append(f"{mean(values):{form}}{spread}")
        ways = [way["agreement"] for one in seeds for way in (one, one["recycled"])]
        same, prompts = (sum(way[key] for way in ways) for key in ("identical", "prompts"))
        rows.append([*row, f"{same} of {prompts}", f"{mean(one.get('tokens', 0) for one in seeds):,.0f}"])
    return rows


def aims(found: Mapping[str, list[Found]]) -> list[str]:
    """Whether each method, on average over seeds, gives the tokens per forward at the price that was aimed at."""
    numbers = [COLUMNS[name][1] for name in ("tokens per forward", "with recycling", "change")]
    said = [f"Aim: at least {TOKENS_PER_FORWARD} tokens per forward for less than {LOSS:.0%} more bits per byte."]
    for name, seeds in found.items():
        ratio, recycled, change = (mean(number(one, found[BASE][0]) for one in seeds) for number in numbers)
        plain, pool = (
            "reached" if each >= TOKENS_PER_FORWARD and change < LOSS else "not reached" for each in (ratio, recycled)
        )
        line = (
            f"- {name}: bits per byte {change:+.2%}; {ratio:.2f} tokens per forward: {plain}; {recycled:.2f} with recycling: "
        )
        said += [] if name == BASE else [line + pool]
    return said


def figure(found: Mapping[str, list[Found]]) -> str:
    """Tokens per forward by block, mean over seeds, as an SVG file of its own."""
    curves = {}
    for name, seeds in found.items():
        points = sorted((of["block"], of["tokens_per_forward"]["value"]) for one in seeds for of in one["by_block"])
        means = {block: mean(value for _, value in group) for block, group in groupby(points, key=lambda point: point[0])}
        curves[name] = ([*means], [*means.values()])
    inks = "--ink: #1b1f24; --muted: #5f6672; --rule: #c9ced6; --series-1: #2b66ad; --series-2: #c76a1e; --series-3: #3a8a62;"
    style = f"<style>svg {{ background: #fff; {inks} --series-4: #7a5aa5; --series-5: #7f8691; }}</style>"
    names = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
    opening, rest = str(line_plot(curves, x="block", y="tokens per forward", from_zero=True)).split(">", 1)
    return f"{opening.replace('<svg', f'<svg {names}', 1)}>{style}{rest}"


def parts(found: Mapping[str, list[Found]], summary: Mapping[str, Any], arguments: argparse.Namespace) -> list[str]:
    """The paragraphs of the page."""
    picture = Path(arguments.output).with_suffix(".svg")
    write_whole(picture, figure(found))
    dropped, speeds = sum(summary["dropped_blocks"].values()), summary["block_by_block"] / max(summary["forwards"], 1)
    return [
        f"Mean ± standard deviation over seeds {arguments.seeds}. Block size {BLOCK}, {arguments.max_new_tokens} new tokens "
        f"for each of {arguments.prompts} test questions, bits per byte of {arguments.text_rows} test answers, "
        f"OMP_NUM_THREADS={os.environ.get('OMP_NUM_THREADS', 'unset')}.",
        f"Trained on the model's own greedy answers to {summary['prompts']:,} training questions ({summary['blocks']:,} "
        f"blocks, {dropped:,} dropped). Their states took {summary['forwards']:,} packed passes ({speeds:.1f} times as many "
        f"one block at a time). Options of all: {COMMON}; {arguments.steps} steps of `{PLAIN}`, the others until they have "
        "read as many tokens of text and states (last column). Passes that renew states are not in it.",
        "Tokens per forward: (new tokens - 1) / passes; greedy decoding is 1. With recycling: the same with a sliding window "
        "and a pool of 16 rejected guesses, whose continuations are more rows of a pass. Fast-forwarded and stationary tokens "
        "are per block. Change: of bits per byte, less is better. Against greedy: tokens per second, one prompt at a time, "
        "over those of greedy decoding of the same model. Greedy tokens: answers of both ways equal to greedy decoding's.",
        markdown_table(HEAD, table_rows(found)),
        "\n".join(aims(found)),
        f"![Tokens per forward by block]({picture.name})",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--methods", nargs="+", default=DEFAULT, choices=list(METHODS))
    parser.add_argument("--steps", type=int, default=60, help=f"of {PLAIN}")
    parser.add_argument("--rows", type=int, default=1000, help="training questions")
    parser.add_argument("--prompts", type=int, default=32, help="test questions")
    parser.add_argument("--max_new_tokens", type=int, default=128, help="of an answer, in training and test")
    parser.add_argument("--text_rows", type=int, default=150, help="test answers for bits per byte")
    parser.add_argument("--runs", default="runs/jacobi", help="where models and measurements are kept")
    parser.add_argument("--output", help="write the table as Markdown to this file, and the figure beside it")
    parser.add_argument("--quick", action="store_true", help="a few steps and rows")
    arguments = parser.parse_args()
    if not MODEL.is_dir():
        sys.exit("skipped: no ../shared/models/gsm8k-lm beside the project")
    if arguments.quick:
        arguments.seeds, arguments.steps, arguments.methods = [0], 2, ["Jacobi Forcing"]
        arguments.rows, arguments.prompts, arguments.text_rows, arguments.max_new_tokens = 16, 4, 8, 48
    runs = ROOT / arguments.runs
    subprocess.run([sys.executable, "examples/gsm8k_rows.py", str(DATA), str(runs / "rows")], cwd=ROOT, check=True)
    states = runs / f"trajectories-{arguments.rows}"
    summary = write_trajectories(
        runs / "rows" / "train.jsonl", states, model=MODEL, limit=arguments.rows, longest=arguments.max_new_tokens
    )
    measure = Measure(
        runs / "rows" / "test.jsonl",
        prompts=arguments.prompts,
        text_rows=arguments.text_rows,
        max_new_tokens=arguments.max_new_tokens,
    )
    found = {BASE: [measure(MODEL, beside=runs / "base")]}
    common = {**COMMON, "model": str(MODEL), "dataset_name": str(states), "max_length": LONGEST}
    for seed in arguments.seeds:
        models = trained_at_equal_tokens(runs, arguments.methods, common=common, steps=arguments.steps, seed=seed)
        for name, final in models.items():
            one = measure(final, beside=final.parent) | {"tokens": seen_tokens(final)}
            found.setdefault(name, []).append(one)
            Console().print(
                seed, name, *(f"{key} {number(one, found[BASE][0]):{form}}" for key, (form, number) in COLUMNS.items())
            )
    table = Table(*HEAD)
    for row in table_rows(found):
        table.add_row(*row)
    Console(width=200).print(table)
    print("\n".join(aims(found)))
    if arguments.output:
        title = "Jacobi decoding of a 4.2M-parameter model before and after consistency training"
        write_results(arguments.output, title=title, parts=parts(found, summary, arguments))


if __name__ == "__main__":
    main()
