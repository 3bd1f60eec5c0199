"""What Sinkhorn's transport adds to forward KL on real text: GSM8K, a 4.2M-parameter teacher, 1.1M-parameter students.

python benchmarks/sinkhorn_gsm8k.py --seeds 0 1 2 --output docs/results/sinkhorn_gsm8k.md
Students see the same tokens in the same order and are scored on answers of test questions. They start either from new weights,
or elsewhere: trained by cross-entropy on the same text with its token ids shifted by half the vocabulary, so that teacher and
student have little mass in common. --quick trains for a few steps, to see that the script works.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import yaml
from gsm8k import TEACHER, begun, head, score
from page import markdown_table, write_results
from rich.console import Console
from rich.table import Table
from training import trained

from kdlib.data import load_rows
from kdlib.data.rows import prepare_dataset
from kdlib.models import load_tokenizer

RUNS = Path("runs/sinkhorn-gsm8k")
ROWS, TOKENS = {"max_rows": 256}, {"geometry": "sample", "loss": "dual"}
METHODS: dict[str, Any] = {
    "forward KL": "ForwardKL",
    "KL + Sinkhorn, batch-wise, T = 1": {"Sinkhorn": {**ROWS, "temperature": 1.0}},
    "KL + Sinkhorn, sample-wise, T = 1": {"Sinkhorn": {**TOKENS, "temperature": 1.0}},
    "total variation": "TotalVariation",
    "Sinkhorn alone, sample-wise, T = 1": {"Sinkhorn": {**TOKENS, "temperature": 1.0, "divergence": None}},
    "KL + Sinkhorn, batch-wise, T = 2": {"Sinkhorn": ROWS},
    "KL + Sinkhorn, sample-wise, T = 2": {"Sinkhorn": TOKENS},
}
NAMES = tuple(METHODS)
MAIN, ELSEWHERE, QUICK = (*NAMES[:3], *NAMES[5:]), NAMES[:5], NAMES[5:]
COLUMNS = ("student", "bits per byte", "KL(p‖q), nats", "KL(q‖p), nats", "common mass Σ min(p, q)")
SCORES = ("bits_per_byte", "kl_forward", "kl_reverse", "acceptance")
Found = list[dict[str, float]]


def common(steps: int, *, seed: int, quick: bool) -> dict[str, Any]:
    """The options that all runs share: those of examples/reasoning.yaml, for ``steps`` optimizer steps."""
    options = yaml.safe_load(Path("examples/reasoning.yaml").read_text())
    left_out = ("output_dir", "objective", "eval_dataset_name", "num_train_epochs")
    options = {key: value for key, value in options.items() if key not in left_out}
    small = (
        {"per_device_train_batch_size": 4, "dataset_name": head(options["dataset_name"], 64, RUNS / "train.jsonl")}
        if quick
        else {}
    )
    return {**options, "max_steps": steps, "seed": seed, "save_strategy": "no", "disable_tqdm": True, **small}


def elsewhere(rows: str, *, limit: int) -> str:
    """The rows with each ordinary token's id shifted by half the vocabulary."""
    path = RUNS / "elsewhere.jsonl"
    if not path.is_file():
        tokenizer = load_tokenizer(TEACHER)
        special = set(tokenizer.all_special_ids)
        ordinary = [index for index in range(len(tokenizer)) if index not in special]
        half = len(ordinary) // 2
        other = dict(zip(ordinary, ordinary[half:] + ordinary[:half], strict=True))

        def shifted(row: Mapping[str, Any]) -> dict[str, Any]:
            return {key: [other.get(index, index) for index in row[key]] for key in ("input_ids", "labels")}

        prepared = prepare_dataset(load_rows(rows).select(range(limit)), tokenizer, max_length=384).dataset
        prepared.map(shifted).to_json(path)
    return str(path)


def scored(model: Path, arguments: Any) -> dict[str, float]:
    """Its scores on the test questions' answers; those that lie beside the model are not taken again."""
    kept = model.parent / "eval" / "text.json"
    found = json.loads(kept.read_text()) if kept.is_file() else {}
    if found.get("rows") == arguments.questions:
        return found
    return score(str(model), rows=arguments.rows, teacher=TEACHER)


def students(methods: Sequence[str], start: Mapping[str, Any], steps: int, *, name: str, arguments: Any) -> dict[str, Found]:
    """The scores of a student of every method and seed; finished ones are not trained again."""
    found: dict[str, Found] = {method: [] for method in methods}
    for seed in arguments.seeds:
        for method in methods:
            options = {**common(steps, seed=seed, quick=arguments.quick), **start}
            where = RUNS / f"{name}-{NAMES.index(method)}-{seed}"
            model = trained("distill", where, **options, objective=METHODS[method])
            found[method].append(scored(model, arguments))
    return found


def from_elsewhere(arguments: Any) -> tuple[dict[str, Any], dict[str, float]]:
    """Where students start in the second table, and its scores."""
    options = common(arguments.start_steps, seed=0, quick=arguments.quick)
    rows = elsewhere("runs/gsm8k/train.jsonl", limit=64 if arguments.quick else 3000)
    model = trained("distill", RUNS / "start", **{**options, "dataset_name": rows, "objective": "CrossEntropy"})
    start = {"model": str(model), "from_scratch": False, "config_overrides": None}
    return start, scored(model, arguments)


def lines(results: Mapping[str, Found]) -> list[list[str]]:
    """Mean and standard deviation over seeds of every score."""
    return [[method, *(_shown([one[name] for one in found]) for name in SCORES)] for method, found in results.items()]


def _shown(values: Sequence[float]) -> str:
    spread = f" ± {stdev(values):.4f}" if len(values) > 1 else ""
    return f"{mean(values):.4f}{spread}"


def seeds_line(results: Mapping[str, Found]) -> str:
    """Bits per byte of every seed, which show whether a difference is more than its noise."""
    of = {method: ", ".join(f"{one['bits_per_byte']:.4f}" for one in found) for method, found in results.items()}
    return "Bits per byte of every seed: " + "; ".join(f"{method} {values}" for method, values in of.items()) + "."


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=80, help="optimizer steps of 16 rows from new weights")
    parser.add_argument("--start-steps", type=int, default=100, help="steps on shifted ids, for the start elsewhere")
    parser.add_argument("--short-steps", type=int, default=40, help="steps from there")
    parser.add_argument("--questions", type=int, default=250, help="test questions whose answers are scored")
    parser.add_argument("--runs", help="where the students are kept, runs/sinkhorn-gsm8k when left out")
    parser.add_argument("--output", type=Path, help="write the tables as Markdown to this file")
    parser.add_argument("--quick", action="store_true", help="a few steps and rows")
    given = parser.parse_args()
    if given.quick:
        given.seeds, given.steps, given.start_steps, given.short_steps, given.questions = [0], 2, 2, 2, 8
    return given


def main() -> None:
    global RUNS
    arguments = parsed()
    output = None if arguments.output is None else arguments.output.resolve()
    RUNS = RUNS if arguments.runs is None else Path(arguments.runs).resolve()
    begun(RUNS)
    arguments.rows = head("runs/gsm8k/test.jsonl", arguments.questions, RUNS / "test.jsonl")
    new = students(QUICK if arguments.quick else MAIN, {}, arguments.steps, name="new", arguments=arguments)
    start, before = from_elsewhere(arguments)
    moved = students(
        NAMES[:1] if arguments.quick else ELSEWHERE, start, arguments.short_steps, name="elsewhere", arguments=arguments
    )
    tables = {"From new weights": lines(new), "From elsewhere": lines({"before": [before], **moved})}
    for title, rows in tables.items():
        shown = Table(*COLUMNS, title=title)
        for row in rows:
            shown.add_row(*row)
        Console().print(shown)
    if output:
        parts = [
            f"Mean ± standard deviation over seeds {arguments.seeds}, answers of {arguments.questions} test questions; equal "
            "tokens for all methods of a table. Teacher: a 4.2M-parameter Llama of the same text; students: 1.1M parameters; "
            f"settings in `examples/reasoning.yaml`, Sinkhorn's defaults but {ROWS} batch-wise and {TOKENS} sample-wise.",
            f"## From new weights, {arguments.steps} steps",
            markdown_table(COLUMNS, tables["From new weights"]),
            seeds_line(new),
            f"## From elsewhere, {arguments.short_steps} steps",
            f"All students start from one that learnt the same text with shifted token ids ({arguments.start_steps} steps of "
            "cross-entropy): what it says has little mass in common with the teacher.",
            markdown_table(COLUMNS, tables["From elsewhere"]),
            seeds_line(moved),
        ]
        write_results(str(output), title="GSM8K: forward KL with and without Sinkhorn", parts=parts)


if __name__ == "__main__":
    main()
