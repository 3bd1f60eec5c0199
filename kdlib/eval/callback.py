"""Scoring the student with lm-eval while it trains."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from kdlib.eval.harness import evaluate
from kdlib.eval.results import summary_rows


class EvaluateCallback(TrainerCallback):
    """Runs lm-eval ``tasks`` on the student at every evaluation; options as in ``kdlib.eval.evaluate``.

    Scores go to metrics.jsonl as ``eval_TASK/METRIC``. Rank 0 scores; a model sharded over ranks cannot be scored by one
    of them
    and raises ValueError.
    """

    def __init__(self, tasks: str | Sequence[str], **options: Any) -> None:
        self.tasks, self.options = tasks, options

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: Any = None,
        processing_class: Any = None,
        **_: Any,
    ) -> None:
        if args.fsdp_plugin_args is not None:
            raise ValueError(
                "tasks cannot be scored during FSDP training: leave eval_strategy out, final/ is scored at the end"
            )
        if not state.is_world_process_zero:
            return
        results = evaluate(model, self.tasks, tokenizer=processing_class, **self.options)
        scores = {f"eval_{row['task']}/{row['metric']}": row["value"] for row in summary_rows(results)}
        state.log_history.append({**scores, "step": state.global_step})
        with (Path(args.output_dir) / "metrics.jsonl").open("a") as file:
            file.write(json.dumps({"step": state.global_step, **scores}) + "\n")
