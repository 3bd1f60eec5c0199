"""The reasoning recipe in small: what each of its stages gains, with intervals, on several seeds.

python benchmarks/reasoning_toy.py --seeds 0 1 2 --output docs/results/reasoning_toy.md
Runs examples/reasoning_toy.yaml by `kdlib run`, which needs vLLM. --quick trains for a few steps, without vLLM and with a judge
that knows nothing, to see that the script works.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml
from page import markdown_table, write_results
from rich.console import Console
from rich.table import Table

from kdlib.eval.results import interval_text
from kdlib.eval.sampled_comparison import gain_text
from kdlib.files import write_whole

RECIPE = Path(__file__).resolve().parents[1] / "examples" / "reasoning_toy.yaml"
MODELS = {"start": "the student, fine-tuned on rows with mistakes", "sft": "then on the teacher's verified answers"}
MODELS |= {"on_policy": "then on its own answers, judged by the teacher", "teacher": "the teacher"}
JUDGE = "def right(completion, row):\n    return len(completion) % 2 == 0\n"


def quick_recipe(directory: Path) -> Path:
    """The recipe with few steps, on what every machine has."""
    judge = write_whole(directory / "judge.py", JUDGE)
    recipe = yaml.safe_load(RECIPE.read_text())
    recipe |= {"verify": f"{judge}:right", "max_completion_length": 8, "save_steps": 2}
    for stage in recipe["stages"]:
        for command, options in stage.items():
            if command == "demo":
                options["quick"] = True
            if "rollout" in options:
                options["rollout"] = {"engine": "hf"}
            if "max_steps" in options:
                options["max_steps"] = 2
            if command == "evaluate":
                stage[command] = {key: options[key] for key in ("problems", "compare")} | {"n": 2, "temperature": 1.0}
    return write_whole(directory / "recipe.yaml", yaml.safe_dump(recipe, sort_keys=False))


def ran(recipe: Path, output: Path, *, seed: int) -> dict[str, Any]:
    """comparison.json of one run; a finished one is not run again."""
    words = [str(recipe), "--output_dir", str(output), "--seed", str(seed)]
    subprocess.run([sys.executable, "-m", "kdlib", "run", *words], check=True)
    found: dict[str, Any] = json.loads((output / "evaluate" / "comparison.json").read_text())
    return found


def table(found: list[dict[str, Any]], seeds: list[int]) -> tuple[list[str], list[list[str]]]:
    """A line for each model and seed: avg@n, pass@n, and what the stage gained in the first."""
    lines = []
    for name, what in MODELS.items():
        for seed, comparison in zip(seeds, found, strict=True):
            first = comparison["rows"][0]
            cells = [interval_text(first["values"][name]), gain_text(gain_of(name, first))]
            truncated = next(row for row in comparison["rows"] if row["metric"] == "truncated")
            lines.append([what, str(seed), *cells, f"{truncated['values'][name]['value']:.3f}"])
    return ["model", "seed", found[0]["rows"][0]["metric"], "gain over the one before", "truncated"], lines


def gain_of(name: str, row: dict[str, Any]) -> dict[str, Any] | None:
    """The gain over the stage before; the teacher is listed first, and is none."""
    gain: dict[str, Any] | None = row["gains"].get(name)
    return None if gain is None or gain["over"] == "teacher" else gain


def means(found: list[dict[str, Any]]) -> str:
    """The mean over seeds of every gain, and at how many of them its interval is above 0."""
    parts = []
    for name in MODELS:
        gains = [gain for comparison in found if (gain := gain_of(name, comparison["rows"][0])) is not None]
        if gains:
            shown = sum(gain["low"] is not None and gain["low"] > 0 for gain in gains)
            mean = statistics.fmean(gain["value"] for gain in gains)
            parts.append(
                f"`{name}` gains {mean:+.3f} over `{gains[0]['over']}` on average, shown at {shown} of {len(gains)} seeds"
            )
    return "; ".join(parts) + "."


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument(
        "--runs", default="runs/reasoning-toy-benchmark", help="where runs are kept; finished ones are not run again"
    )
    parser.add_argument("--output", help="write the table as Markdown to this file")
    parser.add_argument("--quick", action="store_true", help="a few steps of one seed")
    arguments = parser.parse_args()
    seeds, runs = arguments.seeds[:1] if arguments.quick else arguments.seeds, Path(arguments.runs)
    recipe = quick_recipe(runs) if arguments.quick else RECIPE
    found = [ran(recipe, runs / str(seed), seed=seed) for seed in seeds]
    head, lines = table(found, seeds)
    shown = Table(*head)
    for line in lines:
        shown.add_row(*line)
    Console().print(shown)
    if arguments.output:
        n = found[0]["rows"][0]["n"]
        parts = [
            f"`kdlib run examples/reasoning_toy.yaml`, scored on {n} problems that no model has seen. Intervals are 95% over "
            "problems, gains are paired over them.",
            markdown_table(head, lines),
            means(found),
        ]
        write_results(arguments.output, title="The reasoning recipe in small: what each stage gains", parts=parts)


if __name__ == "__main__":
    main()
