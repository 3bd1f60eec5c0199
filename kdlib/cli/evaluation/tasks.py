"""lm-eval tasks of one model, each kept as soon as it is scored."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from kdlib.cli.evaluation.asked import Asked
from kdlib.eval.harness import evaluate
from kdlib.eval.results import merged
from kdlib.eval.tasks import find_tasks

Results = dict[str, Any]


def task_scores(asked: Asked, name: str) -> Results:
    """The results of all tasks together; one that is there already is not scored again."""
    scoring, general, kept = asked.scoring, asked.general, asked.kept(name)
    assert scoring.tasks is not None
    _, tasks = find_tasks(scoring.tasks, include_path=scoring.include_path)
    settings = asked.settings(name) | asdict(scoring) | {"tasks": None, "log_samples": general.log_samples}
    found = {task: kept.get(f"task-{task}", settings) for task in tasks}

    def keep(task: str, results: Results) -> None:
        found[task] = kept.put(f"task-{task}", settings, _reduced(results, log_samples=general.log_samples))

    missing = [task for task, results in found.items() if results is None]
    if missing:
        evaluate(
            asked.models[name],
            each=keep,
            backend=asked.backend(name),
            batch_size=general.batch_size,
            log_samples=general.log_samples or asked.keeps,
            dtype=general.dtype,
            device=general.device,
            model_args=_engine(asked, name),
            **asdict(scoring) | {"tasks": missing},
        )
    every: Results = {}
    for results in found.values():
        every = merged(every, results or {})
    return every


def _engine(asked: Asked, name: str) -> dict[str, Any]:
    """Options of lm-eval's class for the backend."""
    engine = asked.engine
    if asked.backend(name) == "vllm":
        memory = engine.gpu_memory_utilization
        return {"gpu_memory_utilization": memory, "max_model_len": engine.max_model_len, "enforce_eager": engine.enforce_eager}
    if asked.backend(name) == "server":
        return {"timeout": engine.timeout, "tokenizer_name": engine.tokenizer}
    return {}


def _reduced(results: Results, *, log_samples: bool) -> Results:
    """With the scores of each problem in place of the samples, unless these were asked for too."""
    samples = results.get("samples", {})
    paired = {task: _by_problem(found, results["results"][task]) for task, found in samples.items()}
    kept = results if log_samples else {key: value for key, value in results.items() if key != "samples"}
    return {**kept, "per_problem": paired}


def _by_problem(samples: list[Mapping[str, Any]], scores: Mapping[str, Any]) -> dict[str, Any]:
    """{"ids": [...], "values": {"metric,filter": [...]}} of the metrics that are means over problems."""
    ids = sorted({sample["doc_id"] for sample in samples})
    values = {}
    for key, mean in scores.items():
        metric, _, wanted = key.partition(",")
        found = {sample["doc_id"]: sample.get(metric) for sample in samples if sample["filter"] == wanted}
        column = [found.get(problem) for problem in ids]
        numbers = [float(value) for value in column if isinstance(value, int | float)]
        if len(numbers) == len(column) and numbers and math.isclose(statistics.fmean(numbers), mean, abs_tol=1e-9):
            values[key] = numbers
    return {"ids": ids, "values": values}
