"""Models scored one after the other, each part of each once."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

from kdlib.cli.evaluation.asked import Asked
from kdlib.cli.evaluation.problems import check_problems, problem_scores
from kdlib.cli.evaluation.process import in_own_process
from kdlib.cli.evaluation.tasks import task_scores
from kdlib.cli.evaluation.text import check_text, text_scores
from kdlib.eval.results import merged

Results = dict[str, Any]  # of lm-eval's shape
Part = Callable[[Asked, str], Results]  # of the model with this name


def scored(asked: Asked) -> dict[str, Results]:
    """{name: results}, in the order of comparison; mistakes that show without a model are found before the first is loaded."""
    if asked.sampled.problems:
        check_problems(asked)
    if asked.general.dataset_name:
        for name in asked.models:
            check_text(asked, name)
    return {name: _scored(asked, name) for name in asked.models}


def _scored(asked: Asked, name: str) -> Results:
    """One model is in memory at a time, and one engine, which gives its memory back only with its process."""
    found: Results = {"results": {}, "model_name": asked.models[name]}
    for part in _parts(asked):
        own = asked.backend(name) == "vllm"
        results = in_own_process(part, asked, name, what=name) if own else part(asked, name)
        found = merged(found, results)
        _free()
    return found


def _parts(asked: Asked) -> list[Part]:
    wanted = [
        (asked.sampled.problems, problem_scores),
        (asked.scoring.tasks, task_scores),
        (asked.general.dataset_name, text_scores),
    ]
    return [part for option, part in wanted if option]


def _free() -> None:
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
