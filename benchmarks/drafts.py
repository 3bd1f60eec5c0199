"""What a target accepts of drafts trained in different ways, at equal draft tokens: GSM8K, 4.2M-parameter target, 0.6M drafts.

python benchmarks/drafts.py --seeds 0 1 2 --output docs/results/drafts.md
--quick trains two drafts for a few steps, to see that the script works.

For every seed one draft is fine-tuned on the dataset's answers (SFT). From there each method goes on, for as many steps as its
draft tokens (read in training and for selection, and written) reach the budget. Acceptance is that of the test questions.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from page import markdown_table, write_results
from rich.console import Console
from rich.table import Table
from training import trained

from kdlib.data import load_rows
from kdlib.eval import AcceptanceResult, acceptance
from kdlib.files import write_whole
from kdlib.models import load_model, load_tokenizer

ROOT = Path(__file__).resolve().parents[1]
DATA, TARGET = ROOT / "../shared/data/gsm8k", ROOT / "../shared/models/gsm8k-lm"
SHAPE = {"hidden_size": 96, "intermediate_size": 256, "num_hidden_layers": 2, "head_dim": 48}
SHAPE |= {"num_attention_heads": 2, "num_key_value_heads": 2}
GAMMA, NEW_TOKENS, SFT_ROWS, ROWS = 4, 128, 16, 8
ON_POLICY = {"on_policy_fraction": 1.0, "max_completion_length": NEW_TOKENS}
DIVERGENCES = {
    "forward KL": "ForwardKL",
    "reverse KL": "ReverseKL",
    "JSD 0.5": "GeneralizedJSD",
    "TV": "TotalVariation",
}
# name: options, and the draft tokens of a step as a multiple of those of a plain one (measured)
Method = tuple[dict[str, Any], float]
METHODS: dict[str, Method] = {
    "SFT goes on": ({"objective": "CrossEntropy", "data": "gold"}, 1.0),
    "forward KL, dataset's answers": ({"objective": "ForwardKL", "data": "gold"}, 1.0),
    **{f"{name}, target's answers": ({"objective": objective}, 1.0) for name, objective in DIVERGENCES.items()},
    **{f"{name}, draft's own answers": ({"objective": objective, **ON_POLICY}, 1.7) for name, objective in DIVERGENCES.items()},
    "LK hybrid": ({"objective": "LKHybrid"}, 1.0),
    "-log acceptance": ({"objective": "NegLogAcceptance"}, 1.0),
    "AdaSPEC, 0.4": ({"objective": "SelectiveKL", "reference": True}, 2.0),
}
START = "SFT"


def answers_of_the_target(runs: Path, rows: Path) -> Path:
    """One answer of the target to each training question, sampled at temperature 1; left alone when it is there."""
    traces = runs / "target"
    rows_written = traces / "shard-*.jsonl"
    if (traces / "report.json").is_file():
        return rows_written
    words = ["--model", str(TARGET), "--dataset_name", str(rows), "--num_generations", "1", "--max_completion_length", "256"]
    call = [sys.executable, "-m", "kdlib", "generate", *words, "--generation_batch_size", "128", "--output_dir", str(traces)]
    subprocess.run(call, cwd=ROOT, check=True)
    return rows_written


def train(runs: Path, data: dict[str, Path], arguments: argparse.Namespace, *, seed: int) -> dict[str, Path]:
    """{method: the trained draft} of one seed, the draft that all start from first."""
    common = {
        "max_length": 384,
        "per_device_train_batch_size": SFT_ROWS,
        "seed": seed,
        "warmup_steps": 0.05,
        "weight_decay": 0.1,
        "logging_steps": 10,
        "save_strategy": "no",
    }
    sft = {"model": str(TARGET), "from_scratch": True, "config_overrides": SHAPE, "objective": "CrossEntropy"}
    sft |= {"dataset_name": str(data["gold"]), "max_steps": arguments.sft_steps, "learning_rate": 4e-3}
    found = {START: trained("distill", runs / f"{seed}-sft", **sft, **common)}
    common |= {"model": str(found[START]), "teacher": str(TARGET), "learning_rate": arguments.learning_rate}
    common["per_device_train_batch_size"] = ROWS
    common["evaluate.limit"] = 0
    for name in arguments.methods:
        given, per_step = METHODS[name]
        options = {**given, "dataset_name": str(data[given.get("data", "target")])}
        options.pop("data", None)
        steps = max(1, round(arguments.steps / per_step))
        run = runs / f"{seed}-{''.join(c if c.isalnum() else '-' for c in name)}"
        if options.pop("reference", False):
            reference = {**options, "objective": "ForwardKL", "max_steps": steps}
            options["reference"] = str(trained("draft", Path(f"{run}-reference"), **common, **reference))
        found[name] = trained("draft", run, **common, **options, max_steps=steps)
    return found


def draft_tokens(final: Path) -> float:
    """Tokens read and written by the draft over the run."""
    lines = [json.loads(line) for line in (final.parent / "metrics.jsonl").read_text().splitlines()]
    return float(max(line.get("draft_tokens", line.get("seen_tokens", 0)) for line in lines))


class Measure:
    """Acceptance of drafts on the same test questions, with the target's answers sampled once."""

    def __init__(self, rows: Path, *, limit: int, decoded: int) -> None:
        self.decoded = decoded
        self.tokenizer, self.target = load_tokenizer(str(TARGET)), load_model(str(TARGET))
        self.rows = load_rows(str(rows)).select(range(limit))
        self.responses: dict[float, list[list[int]]] = {}

    def __call__(self, draft: Path) -> dict[str, float]:
        """The scores of a draft, measured once and kept beside it."""
        kept = draft.parent / f"measured-{len(self.rows)}-{self.decoded}.json"
        if not kept.is_file():
            write_whole(kept, json.dumps(self.measured(draft)))
        return json.loads(kept.read_text())

    def measured(self, draft: Path) -> dict[str, float]:
        """Expected acceptance on all questions, acceptance length (much slower) on the first ``self.decoded``."""
        found: dict[str, float] = {}
        for temperature, way in ((0.0, "greedy"), (1.0, "probabilistic")):
            answers = self.responses.get(temperature)
            whole = self.run(draft, self.rows, temperature=temperature, responses=answers)
            self.responses[temperature] = whole.responses
            some, answers = self.rows.select(range(self.decoded)), whole.responses[: self.decoded]
            counted = self.run(draft, some, temperature=temperature, responses=answers, draft_sampling=(way,)).empirical[0]
            found[f"alpha {temperature}"] = whole.expected[way].acceptance_rate.value
            found[f"tau {temperature}"] = counted.acceptance_length.value
            found[f"accepted {temperature}"] = counted.acceptance_length.value - 1.0
            if temperature > 0:
                found["alpha greedy draft"] = whole.expected["greedy"].acceptance_rate.value
        return found

    def run(self, draft: Path, rows: Any, **options: Any) -> AcceptanceResult:
        fixed = {"gamma": GAMMA, "max_new_tokens": NEW_TOKENS, "batch_size": 32, "resamples": 100}
        settings = {"draft_sampling": (), "checks": False, "timing": False, **fixed, **options}
        return acceptance(self.target, str(draft), rows, tokenizer=self.tokenizer, **settings)


COLUMNS = {
    "tau 0.0": "acceptance length, greedy",
    "alpha 0.0": "acceptance, greedy",
    "tau 1.0": "acceptance length, T = 1",
    "alpha 1.0": "acceptance, T = 1",
    "alpha greedy draft": "acceptance, T = 1, greedy draft",
}


def cells(found: dict[str, list[dict[str, float]]]) -> list[list[str]]:
    """A row for each method: mean ± standard deviation over seeds, and accepted tokens against the SFT draft's."""
    rows = []
    for name, seeds in found.items():
        row = [name]
        for key in COLUMNS:
            values = [one[key] for one in seeds]
            row.append(f"{mean(values):.3f}" + (f" ± {stdev(values):.3f}" if len(values) > 1 else ""))
        for temperature in ("0.0", "1.0"):
            ratios = [
                one[f"accepted {temperature}"] / start[f"accepted {temperature}"]
                for one, start in zip(seeds, found[START], strict=True)
            ]
            row.append(f"{100 * (mean(ratios) - 1):+.1f}%")
        rows.append([*row, f"{mean(one['tokens'] for one in seeds):,.0f}"])
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--sft_steps", type=int, default=600)
    parser.add_argument("--steps", type=int, default=160, help="of a method that reads each row once")
    parser.add_argument("--learning_rate", type=float, default=3e-3)
    parser.add_argument("--train_only", action="store_true", help="measure nothing: several seeds may train side by side")
    parser.add_argument("--prompts", type=int, default=48, help="test questions")
    parser.add_argument("--decoded", type=int, default=24, help="how many of them are decoded speculatively")
    parser.add_argument("--runs", default="runs/drafts", help="where the drafts are kept")
    parser.add_argument("--output", help="write the table as Markdown to this file")
    parser.add_argument("--quick", action="store_true", help="a few steps and rows")
    arguments = parser.parse_args()
    if not TARGET.is_dir():
        sys.exit("skipped: no ../shared/models/gsm8k-lm beside the project")
    runs = ROOT / arguments.runs
    subprocess.run([sys.executable, "examples/gsm8k_rows.py", str(DATA), str(runs / "rows")], cwd=ROOT, check=True)
    gold = runs / "rows" / "train.jsonl"
    if arguments.quick:
        arguments.sft_steps, arguments.steps, arguments.seeds = 3, 2, [0]
        arguments.prompts, arguments.decoded, arguments.methods = 4, 2, ["AdaSPEC, 0.4"]
        gold = runs / "rows" / "few.jsonl"
        gold.write_text("".join((runs / "rows" / "train.jsonl").read_text().splitlines(keepends=True)[:48]))
    data = {"gold": gold, "target": answers_of_the_target(runs, gold)}
    if arguments.train_only:
        for seed in arguments.seeds:
            train(runs, data, arguments, seed=seed)
        return
    measure = Measure(runs / "rows" / "test.jsonl", limit=arguments.prompts, decoded=arguments.decoded)
    found: dict[str, list[dict[str, float]]] = {}
    for seed in arguments.seeds:
        for name, final in train(runs, data, arguments, seed=seed).items():
            found.setdefault(name, []).append(measure(final) | {"tokens": draft_tokens(final)})
            Console().print(seed, name, {key: round(value, 4) for key, value in found[name][-1].items()})
    head = ["draft", *COLUMNS.values(), "accepted tokens, greedy", "accepted tokens, T = 1", "draft tokens"]
    rows = cells(found)
    table = Table(*head)
    for row in rows:
        table.add_row(*row)
    Console(width=200).print(table)
    if arguments.output:
        write_results(
            arguments.output,
            title="Drafts for a 4.2M-parameter target, at equal draft tokens",
            parts=parts(head, rows, arguments),
        )


def parts(head: list[str], rows: list[list[str]], arguments: argparse.Namespace) -> list[str]:
    threads = os.environ.get("OMP_NUM_THREADS", "unset")
    return [
        f"Mean ± standard deviation over seeds {arguments.seeds}; acceptance on the target's answers (up to {NEW_TOKENS} "
        f"tokens) to {arguments.prompts} test questions of GSM8K, acceptance length on the first {arguments.decoded}; "
        f"OMP_NUM_THREADS={threads}.",
        f"Target: a 4.2M-parameter Llama trained on GSM8K. Drafts: 0.6M parameters ({SHAPE}), new weights, fine-tuned for "
        f"{arguments.sft_steps} steps of {SFT_ROWS} rows on the dataset's answers (`{START}`). Every other line goes on from "
        f"there with learning rate {arguments.learning_rate}, until the draft has read and written about as many tokens as "
        f"{arguments.steps} plain steps of {ROWS} rows take (last column; AdaSPEC's reference takes as many again, which are "
        "not counted).",
        "Acceptance length: tokens per verify round, the bonus token included, counted in speculative decoding with "
        f"num_speculative_tokens {GAMMA}. Acceptance: sum of min(p, q) on the target's own answers (greedy: share of equal "
        "argmax; greedy draft: p(argmax q)). Accepted tokens: accepted draft tokens per round, against the SFT draft's.",
        markdown_table(head, rows),
    ]


if __name__ == "__main__":
    main()
