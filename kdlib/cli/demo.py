"""``kdlib demo``: made-up word problems, a teacher, two students on the same tokens, lm-eval on all three, one page to read."""

from __future__ import annotations

import json
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from kdlib.cli.parsing import parse

DESCRIPTION = """No GPU, no network, no files but its own, a few minutes on two cores.

Multi-step arithmetic word problems with worked solutions are generated; one calculation in four is wrong, as in text that
people write. A small teacher is trained on many of them, then two equal students on few: one by plain fine-tuning, one by
distillation, on the same rows in the same order. lm-eval scores all three on problems that none has seen.
The same command again goes on where it stopped, or shows the result that is there; --overwrite true starts anew."""

MARKER = "demo.json"


@dataclass
class DemoArguments:
    """How the demo is made.

    Args:
        output_dir: where data, models and the report are written.
        seed: of the problems, the models and the order of rows.
        overwrite: start anew, deleting an earlier demo in output_dir.
        quick: far fewer steps, to see that everything runs; its scores mean nothing.
    """

    output_dir: str = "kdlib-demo"
    seed: int = 0
    overwrite: bool = False
    quick: bool = False


def run(words: list[str]) -> int:
    options = parse("demo", DESCRIPTION, [DemoArguments], words)
    if options is None:
        return 0
    arguments = options.build(DemoArguments)
    demo = _Demo(arguments)
    demo.begin()
    for stage in (demo.train_teacher, demo.train_students, demo.score):
        stopped = stage()
        if stopped:
            return stopped
    return 0


class _Demo:
    """The stages in order; each leaves its result on disk and is skipped when that is there."""

    def __init__(self, arguments: DemoArguments) -> None:
        self.arguments, self.root = arguments, Path(arguments.output_dir)
        self.console = Console(soft_wrap=True, highlight=False)
        self.started = time.monotonic()

    def begin(self) -> None:
        """Data, tokenizer, untrained student and the lm-eval task; refuses a directory that holds something else."""
        from kdlib.cli.demo_data import write_data

        settings = {"seed": self.arguments.seed, "quick": self.arguments.quick}
        marker = self.root / MARKER
        if self.arguments.overwrite and marker.is_file():
            shutil.rmtree(self.root)
        if marker.is_file():
            held = json.loads(marker.read_text())
            if held != settings:
                raise ValueError(
                    f"{self.root} holds a demo with {held}: choose another --output_dir, or start anew with --overwrite true"
                )
            return
        if self.root.is_dir() and any(self.root.iterdir()):
            raise ValueError(f"{self.root} is not empty and holds no demo: choose another --output_dir")
        self._say("1/4 generating problems")
        write_data(self.root, seed=self.arguments.seed, quick=self.arguments.quick)
        marker.write_text(json.dumps(settings))

    def train_teacher(self) -> int:
        self._say("2/4 training the teacher on many problems")
        return self._distill("teacher", model="blank-teacher", rows="teacher_train", objective="CrossEntropy")

    def train_students(self) -> int:
        self._say("3/4 training two equal students on few problems")
        stopped = self._distill("finetuned", model="student", rows="train", objective="CrossEntropy")
        return stopped or self._distill("distilled", model="student", rows="train", objective="ForwardKL")

    def score(self) -> int:
        from kdlib.cli.demo_report import demo_report
        from kdlib.eval.arithmetic_task import TASK

        self._say("4/4 scoring on problems that none has seen")
        table, page = demo_report(self.root, task=TASK, seed=self.arguments.seed)
        self.console.print(table)
        seconds = time.monotonic() - self.started
        self.console.print(
            f"report  {page}\nstudent {self.root / 'distilled' / 'final'}\nthis call took {seconds:.0f} s", markup=False
        )
        again = f"--model {self.root / 'distilled' / 'final'} --include_path {self.root / 'tasks'} --tasks {TASK}"
        self.console.print(f"next    kdlib evaluate {again}", markup=False)
        return 0

    def _distill(self, name: str, *, model: str, rows: str, objective: str) -> int:
        """One `kdlib distill` run in this process; a finished one is left alone, an interrupted one resumes."""
        from kdlib.cli import distill
        from kdlib.cli.demo_data import settings

        target = self.root / name
        if (target / "final").is_dir():
            return 0
        chosen: dict[str, Any] = settings("teacher" if name == "teacher" else "student", quick=self.arguments.quick)
        words = {
            "model": self.root / model,
            "dataset_name": self.root / f"{rows}.jsonl",
            "objective": objective,
            "seed": self.arguments.seed,
            "output_dir": target,
            "use_cpu": "true",
            **chosen,
        }
        if name == "distilled":
            words["teacher"] = self.root / "teacher" / "final"
        return distill.run([word for key, value in words.items() for word in (f"--{key}", str(value))], quiet=True)

    def _say(self, what: str) -> None:
        self.console.print(what, style="bold", markup=False)
