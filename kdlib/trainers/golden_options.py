"""What the options of the golden metric ask of the others."""

from __future__ import annotations

from typing import Any

BEST_GOLDEN = "eval_golden"  # among the metrics of an evaluation, where load_best_model_at_end finds it


def keep_best(args: Any) -> None:
    """golden_stop: a checkpoint at every evaluation, and the one with the best golden metric is what the run ends with."""
    args.load_best_model_at_end, args.metric_for_best_model, args.greater_is_better = True, BEST_GOLDEN, False
    args.save_strategy = args.eval_strategy
    args.eval_steps = args.eval_steps or args.logging_steps
    args.save_steps = args.eval_steps


def refuse_golden(args: Any) -> None:
    """ValueError for options of the golden metric that do not go together."""
    named = [name for name in ("golden_dataset_name", "golden_teacher") if getattr(args, name) is not None]
    if len(named) == 2:
        raise ValueError("golden_dataset_name and golden_teacher are two golden metrics: leave one out")
    if args.golden_stop and not named:
        raise ValueError("golden_stop needs a golden metric: add --golden_dataset_name ROWS or --golden_teacher MODEL")
    if named and args.eval_strategy == "no":
        raise ValueError(
            f"{named[0]} is measured at every evaluation: add --eval_strategy steps --eval_steps N and --eval_dataset_name ROWS"
        )
