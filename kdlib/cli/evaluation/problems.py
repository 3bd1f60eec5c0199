"""Problems answered by one model through the machinery of ``kdlib generate``, and judged."""

from __future__ import annotations

import tempfile
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from datasets import Dataset

from kdlib.cli.evaluation.asked import Asked
from kdlib.cli.evaluation.judged import Judged, judged
from kdlib.cli.generate import GenerateArguments, answered
from kdlib.cli.generation.source import source_of
from kdlib.cli.generation.verify import load_verifier, verifier_fingerprint
from kdlib.data import load_rows
from kdlib.data.traces import Prompts
from kdlib.eval.diffusion_point import weights_of
from kdlib.eval.sampled_defaults import Sampling, sampling_of
from kdlib.eval.sampled_metrics import as_results, metric_values
from kdlib.eval.sampled_rows import limited, rows_fingerprint
from kdlib.eval.sampled_thinking import thinking_of
from kdlib.samplers.config import RolloutConfig

PART = "problems"


def check_problems(asked: Asked) -> None:
    """ValueError when rows or verifier are not there."""
    s, rows = asked.sampled, _rows(asked)
    with ExitStack() as stack:
        load_verifier(s.verify, answer_column=s.answer_column, columns=rows.column_names, stack=stack)


def problem_scores(asked: Asked, name: str) -> dict[str, Any]:
    """The results of the problems; what is answered already is not sampled again, another verifier judges it anew."""
    s, rows, kept = asked.sampled, _rows(asked), asked.kept(name)
    settings = asked.settings(name) | {
        "rows": rows_fingerprint(rows),
        "verifier_file": verifier_fingerprint(s.verify),
        "task": asked.problems_task,
        **{key: value for key, value in vars(s).items() if key != "generation_batch_size"},
    }
    found = kept.get(PART, settings, redo=True)
    return kept.put(PART, settings, _measured(asked, name, rows)) if found is None else found


def _rows(asked: Asked) -> Dataset:
    """The problems, as many as ``limit`` leaves."""
    s = asked.sampled
    assert s.problems is not None
    return limited(load_rows(s.problems, split=s.problems_split, config=s.problems_config), asked.scoring.limit)


def _measured(asked: Asked, name: str, rows: Dataset) -> dict[str, Any]:
    s = asked.sampled
    with ExitStack() as stack:
        verifier = load_verifier(s.verify, answer_column=s.answer_column, columns=rows.column_names, stack=stack)
        kept = asked.kept(name).directory
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory())) if kept is None else kept / PART
        a = _generation(asked, name, directory)
        source = source_of(a)
        sampling = sampling_of(a.tokenizer or source.checkpoint, n=s.n, temperature=s.temperature, top_p=s.top_p, top_k=s.top_k)
        drawn = replace(source.rollout, temperature=sampling.temperature, top_p=sampling.top_p, top_k=sampling.top_k)
        source, more = replace(source, rollout=drawn), {"weights": weights_of(a.model)}
        prompts, _ = answered(a, rows, source=source, verifier=None, stack=stack, more=more)
        assert verifier is not None
        found = judged(
            prompts,
            directory,
            n=s.n,
            limit=s.max_completion_length,
            verifier=verifier,
            thinking=thinking_of(s.thinking_end, source.tokenizer),
        )
    return _results(asked, found, prompts=prompts, sampling=sampling)


def _generation(asked: Asked, name: str, directory: Path) -> GenerateArguments:
    """What ``kdlib generate`` is asked; how completions are drawn is the model's to say, and comes later."""
    s, g, e, model, backend = asked.sampled, asked.general, asked.engine, asked.models[name], asked.backend(name)
    assert s.problems is not None
    rollout = RolloutConfig(
        engine="server" if backend == "server" else "vllm" if backend == "vllm" else "hf",
        url=model if backend == "server" else None,
        gpu_memory_utilization=e.gpu_memory_utilization,
        max_model_len=e.max_model_len if backend == "vllm" else None,
        enforce_eager=e.enforce_eager,
        timeout=e.timeout,
        patience=e.patience,
    )
    return GenerateArguments(
        model=model,
        dataset_name=s.problems,
        output_dir=str(directory),
        num_generations=s.n,
        max_completion_length=s.max_completion_length,
        rollout=rollout,
        tokenizer=e.tokenizer if backend == "server" else None,
        apply_chat_template=s.problems_as_chat,
        chat_template_kwargs=s.chat_template_kwargs,
        generation_batch_size=s.generation_batch_size,
        dtype=g.dtype,
        device=g.device if backend == "hf" else None,
        seed=s.seed,
        overwrite=g.overwrite,
    )


def _results(asked: Asked, found: Judged, *, prompts: Prompts, sampling: Sampling) -> dict[str, Any]:
    s, task, rows = asked.sampled, asked.problems_task, len(prompts.rows)
    values = metric_values(found.answers, n=s.n, pass_at=s.pass_at or ())
    left_out = dict(prompts.skipped) | ({"an earlier row has the prompt": prompts.duplicates} if prompts.duplicates else {})
    facts = {
        "n": s.n,
        "max_completion_length": s.max_completion_length,
        "verify": s.verify,
        "sampling": str(sampling),
        "not_applied": sampling.not_applied,
        "completions": s.n * len(found.answers),
        "not_judged": dict(found.not_judged),
        "unanswered": found.unanswered,
        "left_out": left_out,
    }
    return {**as_results(values, task=task, rows=rows, resamples=s.resamples), "sampled": {task: facts}}
