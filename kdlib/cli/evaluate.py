"""``kdlib evaluate``: problems of your own, lm-eval tasks, bits per byte on a text, and KL to a teacher."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from kdlib.cli.evaluation.asked import Asked, EngineArguments
from kdlib.cli.evaluation.sampled import SampledArguments
from kdlib.cli.parsing import parse
from kdlib.cli.scoring import ScoringArguments, check_tasks
from kdlib.cli.stoppable import run_stoppable

DESCRIPTION = """Scores a model: problems with answers (--problems, --verify: avg@n and pass@k), lm-eval tasks (--tasks),
bits per byte of a text (--dataset_name), and KL to a teacher (--teacher).

--compare.base BASE --compare.teacher TEACHER score further models on the same problems, in one table with what each gains over
the one before it. What is done is kept in --output_path: the same command continues.

kdlib evaluate acceptance measures a draft for speculative decoding, kdlib evaluate jacobi the tokens per forward pass of a
model that decodes in parallel, kdlib evaluate diffusion accuracy against forward passes of a diffusion language model: see
their own --help."""


@dataclass
class EvaluateArguments:
    """What is scored, on what.

    Args:
        model: a path, a Hub id, or the URL of a vLLM server.
        backend: hf runs the model in this process, vllm in an engine, server asks the vLLM server whose URL model is.
        name: what the model is called in tables and files, student when left out.
        compare: further models on the same problems, NAME: path, Hub id or URL; each gains over the one before it, the model
            is the last.
        teacher: report KL both ways and top-1 agreement with this model on dataset_name.
        dataset_name: rows for bits per byte, as for kdlib distill.
        dataset_test_split: split of these rows.
        max_length: rows longer than this keep their first max_length tokens.
        batch_size: rows at a time; of a server, requests at a time.
        output_path: write results as JSON to this file or directory; with problems, compare or name a directory that the same
            command continues in.
        log_samples: keep every prompt and answer of tasks in that JSON.
        dtype: auto (as saved), float32 or bfloat16.
        device: cpu, cuda or cuda:N; chosen when left out; backend hf.
        overwrite: score anew what output_path has already.
    """

    model: str
    backend: Literal["hf", "vllm", "server"] = "hf"
    name: str | None = None
    compare: dict[str, str] | None = None
    teacher: str | None = None
    dataset_name: str | None = None
    dataset_test_split: str = "train"
    max_length: int = 1024
    batch_size: int = 8
    output_path: str | None = None
    log_samples: bool = False
    dtype: str = "auto"
    device: str | None = None
    overwrite: bool = False


def run(words: list[str]) -> int:
    if words[:1] == ["acceptance"]:
        from kdlib.cli.evaluation.acceptance import run as run_acceptance

        return run_acceptance(words[1:])
    if words[:1] == ["jacobi"]:
        from kdlib.cli.evaluation.jacobi import run as run_jacobi

        return run_jacobi(words[1:])
    if words[:1] == ["diffusion"]:
        from kdlib.cli.evaluation.diffusion import run as run_diffusion

        return run_diffusion(words[1:])
    classes = [EvaluateArguments, SampledArguments, EngineArguments, ScoringArguments]
    options = parse("evaluate", DESCRIPTION, classes, words)
    if options is None:
        return 0
    general, sampled, engine, scoring = options.instances
    asked = Asked(general=general, sampled=sampled, engine=engine, scoring=scoring)
    asked.check()
    check_tasks(scoring)
    return _evaluated(asked) if asked.directory is None else run_stoppable(lambda: _evaluated(asked))


def _evaluated(asked: Asked) -> int:
    from kdlib.cli.evaluation.models import scored
    from kdlib.cli.evaluation.show import show

    show(asked, scored(asked))
    return 0
