"""Fine-tuning against distillation on real text: GSM8K, a 4.2M-parameter teacher, 1.1M-parameter students, the same tokens.

python benchmarks/gsm8k.py --seeds 0 1 2 --output docs/results/gsm8k.md
Each student is trained by `kdlib distill --config examples/reasoning.yaml`, then scored on the test questions' answers: bits
per byte, KL to the teacher, top-1 agreement. --quick trains two students for a few steps, to see that the script works.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

from kdlib.cli.env import machine_line
from kdlib.files import write_whole

ROOT = Path(__file__).resolve().parents[1]
DATA, TEACHER = "../shared/data/gsm8k", "../shared/models/gsm8k-lm"
METHODS = {"fine-tuning": "CrossEntropy", "forward KL": "ForwardKL", "JSD 0.5": "GeneralizedJSD", "skew KL": "SkewKL"}
SCORES = ("bits_per_byte", "kl_forward", "kl_reverse", "top1_agreement")


def run(*words: str) -> None:
    subprocess.run([sys.executable, *words], cwd=ROOT, check=True)


def begun(runs: Path) -> None:
    """In the project's directory, with ``runs`` and the rows of GSM8K made; ends where the teacher is not there."""
    os.chdir(ROOT)
    if not Path(TEACHER).is_dir():
        sys.exit(f"skipped: no {TEACHER} beside the project")
    runs.mkdir(parents=True, exist_ok=True)
    run("examples/gsm8k_rows.py", DATA, "runs/gsm8k")


def head(rows: str, count: int, target: Path) -> str:
    """The first rows of a file, in ``target``."""
    write_whole(target, "".join(Path(rows).read_text().splitlines(keepends=True)[:count]))
    return str(target)


def train(objective: str, seed: int, *, root: str, extra: list[str]) -> str:
    """The final/ directory of one run; a finished run is not trained again."""
    directory = f"{root}/{objective}-{seed}"
    words = ["--config", "examples/reasoning.yaml", "--objective", objective, "--seed", str(seed), "--output_dir", directory]
    run("-m", "kdlib", "distill", *words, *extra)
    return f"{directory}/final"


def score(model: str, *, rows: str, teacher: str | None) -> dict[str, float]:
    target = ROOT / model / ".." / "eval" / "text.json" if model != TEACHER else ROOT / "runs" / "gsm8k-teacher.json"
    words = [
        "--model",
        model,
        "--dataset_name",
        rows,
        "--max_length",
        "384",
        "--batch_size",
        "32",
        "--output_path",
        str(target),
    ]
    run("-m", "kdlib", "evaluate", *words, *(["--teacher", teacher] if teacher else []))
    return json.loads(target.read_text())


def summary(results: dict[str, list[dict[str, float]]], teacher: dict[str, float]) -> list[list[str]]:
    """Rows of the table: mean and standard deviation over seeds of every score."""
    rows = [["teacher", f"{teacher['bits_per_byte']:.4f}", "0", "0", "1"]]
    for method, found in results.items():
        cells = []
        for name in SCORES:
            values = [one[name] for one in found]
            spread = f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):.4f}{spread}")
        rows.append([method, *cells])
    return rows


def report(rows: list[list[str]], arguments: argparse.Namespace, details: dict[str, list[dict[str, float]]]) -> str:
    head = ["student", "bits per byte", "KL(p‖q), nats", "KL(q‖p), nats", "top-1 agreement"]
    lines = [
        "# GSM8K: fine-tuning against distillation",
        "",
        f"Command: `python benchmarks/gsm8k.py {' '.join(sys.argv[1:])}`",
        "",
    ]
    lines += [
        f"Mean ± standard deviation over seeds {arguments.seeds}; scored on all answers of the test questions.",
        "Teacher: a 4.2M-parameter Llama trained on the same text.",
        "Students: 1.1M parameters, new weights, the same rows in the same order; settings in `examples/reasoning.yaml`.",
        "",
        "| " + " | ".join(head) + " |",
        "|---|" + "---:|" * (len(head) - 1),
        *("| " + " | ".join(row) + " |" for row in rows),
        "",
        "Bits per byte of every seed: "
        + "; ".join(
            f"{method} " + ", ".join(f"{one['bits_per_byte']:.4f}" for one in found) for method, found in details.items()
        )
        + ".",
        "",
        machine_line(),
        "",
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--methods", nargs="+", default=["fine-tuning", "forward KL"], choices=list(METHODS))
    parser.add_argument("--runs", default="runs/gsm8k-benchmark", help="where the students are kept")
    parser.add_argument("--extra", default="", help="more options for kdlib distill, for example '--learning_rate 0.002'")
    parser.add_argument("--output", help="write the table as Markdown to this file")
    parser.add_argument("--quick", action="store_true", help="a few steps and rows")
    arguments = parser.parse_args()
    if not (ROOT / TEACHER).is_dir():
        sys.exit(f"skipped: no {TEACHER} beside the project")
    run("examples/gsm8k_rows.py", DATA, "runs/gsm8k")
    extra, rows = arguments.extra.split(), "runs/gsm8k/test.jsonl"
    if arguments.quick:
        extra += ["--max_steps", "3", "--per_device_train_batch_size", "4", "--eval_dataset_name", "runs/gsm8k/few.jsonl"]
        rows = "runs/gsm8k/few.jsonl"
        (ROOT / rows).write_text("".join((ROOT / "runs/gsm8k/test.jsonl").read_text().splitlines(keepends=True)[:16]))
    teacher = score(TEACHER, rows=rows, teacher=None)
    results = {
        method: [
            score(train(METHODS[method], seed, root=arguments.runs, extra=extra), rows=rows, teacher=TEACHER)
            for seed in arguments.seeds
        ]
        for method in arguments.methods
    }
    table = Table("student", *SCORES)
    for row in summary(results, teacher):
        table.add_row(*row)
    Console().print(table)
    if arguments.output:
        write_whole(arguments.output, report(summary(results, teacher), arguments, results))


if __name__ == "__main__":
    main()
