"""The demo over several seeds: how often, and by how much, the distilled student beats the fine-tuned one.

python benchmarks/demo.py --seeds 0 1 2 3 4 --output docs/results/demo.md
--quick runs one seed for a few steps, to see that the script works.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

from kdlib.cli.demo_report import MODELS
from kdlib.cli.env import machine_line
from kdlib.eval.results import interval_text, summary_rows
from kdlib.files import write_whole


def demo(seed: int, directory: Path, *, quick: bool) -> float:
    """Runs the demo; the seconds it took."""
    start = time.monotonic()
    words = ["--output_dir", str(directory), "--seed", str(seed), "--quick", str(quick).lower()]
    subprocess.run([sys.executable, "-m", "kdlib", "demo", *words], check=True)
    return time.monotonic() - start


def scores(directory: Path) -> list[str]:
    """Accuracy and its 95% interval, of the three models."""
    files = [directory / folder / "eval" / "final.json" for folder in MODELS.values()]
    return [interval_text(summary_rows(json.loads(file.read_text()))[0]) for file in files]


def report(rows: list[list[str]]) -> str:
    head = ["seed", *(f"{name}" for name in MODELS), "seconds"]
    lines = [
        "# The demo over seeds",
        "",
        f"Command: `python benchmarks/demo.py {' '.join(sys.argv[1:])}`",
        "",
        "Accuracy on problems that none has seen, with its 95% interval over problems. Both students saw the same rows in",
        "the same order; a seed changes problems, initial weights and order.",
        "",
        "| " + " | ".join(head) + " |",
        "|---|" + "---:|" * (len(head) - 1),
        *("| " + " | ".join(row) + " |" for row in rows),
        "",
        machine_line(),
        "",
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument(
        "--runs", default="runs/demo-benchmark", help="where the demos are kept; finished ones are not run again"
    )
    parser.add_argument("--output", help="write the table as Markdown to this file")
    parser.add_argument("--quick", action="store_true", help="a few steps of one seed")
    arguments = parser.parse_args()
    rows = []
    for seed in arguments.seeds[:1] if arguments.quick else arguments.seeds:
        directory = Path(arguments.runs) / str(seed)
        seconds = demo(seed, directory, quick=arguments.quick)
        rows.append([str(seed), *scores(directory), f"{seconds:.0f}"])
    table = Table("seed", *MODELS, "seconds")
    for row in rows:
        table.add_row(*row)
    Console().print(table)
    if arguments.output:
        write_whole(arguments.output, report(rows))


if __name__ == "__main__":
    main()
