"""lm-eval in process: ``evaluate`` a path, a Hub id, or a model that is being trained."""

from __future__ import annotations

import copy
import importlib.util
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch

from kdlib.eval.modes import own_randomness
from kdlib.eval.quiet import quiet_lm_eval
from kdlib.eval.results import merged, write_results
from kdlib.eval.tasks import find_tasks
from kdlib.models import evaluating

AS_IT_IS = {"device": None, "dtype": "auto"}  # no option of loading


def evaluate(
    model: Any,
    tasks: str | Sequence[str],
    *,
    tokenizer: Any = None,
    num_fewshot: int | None = None,
    batch_size: int | str = 8,
    limit: int | float | None = None,
    apply_chat_template: bool | str = False,
    gen_kwargs: Mapping[str, Any] | str | None = None,
    include_path: str | os.PathLike[str] | Sequence[str] | None = None,
    log_samples: bool = False,
    output_path: str | os.PathLike[str] | None = None,
    device: str | None = None,
    dtype: str | torch.dtype = "auto",
    seed: int = 0,
    model_args: Mapping[str, Any] | None = None,
    decoder: Mapping[str, Any] | None = None,
    backend: str = "hf",
    each: Callable[[str, dict[str, Any]], None] | None = None,
) -> dict[str, Any]:
    """Scores ``model`` with lm-eval's ``simple_evaluate``; returns lm-eval's results, plus ``model_name``.

    ``model``: a path or Hub id (an adapter directory too), or a transformers or peft model with its
    ``tokenizer``. A model object stays on its device and in its dtype; it is scored in eval mode, generates
    with a KV cache, and is given back with its training flags and config as they were. Global random
    generators are untouched either way. ``tasks``: names, globs, or YAML files; with ``include_path`` (a
    directory of YAML tasks) no network is needed. ``model_args``: further arguments of lm-eval's HFLM.
    ``backend``: hf; vllm for an engine in this process, server for the URL of one (``kdlib.eval.backends``), which need a
    name. ``each``: called with every task's name and results as soon as it is scored; tasks are then scored one by one.
    ``decoder``: how the model generates where that is not token by token; the results then have
    ``tokens_per_forward``. Of a diffusion language model (``kdlib.diffusion``) these are options of its decoder,
    ``{"gen_length": 128, "strategy": "LowConfidence"}``, in place of its own settings, and likelihoods are Monte-Carlo
    bounds (``kdlib.eval.diffusion_lm``; ``model_args={"mc_samples": 128}``). Of any other they are options of
    the Jacobi decoder, ``{"block_size": 16}``, which is greedy, so the answers are the same, as are likelihoods. The other
    options are lm-eval's own. ``output_path``: a .json file, or a directory that gets ``<tasks>.json``.

    A model object is not spread over processes: call this on one rank (another local rank gets an empty
    dictionary). Raises ValueError when lm-eval is missing, a task is unknown, a path does not load, a model
    object comes without a tokenizer, or with ``device``, ``dtype`` or ``model_args``, which belong to
    loading, for a ``decoder`` with an unknown option, and for tasks that ask for what it does not have.
    """
    require_lm_eval()
    by_path = isinstance(model, str | os.PathLike)
    with own_randomness(), nullcontext() if by_path else evaluating(model):
        manager, names = find_tasks([tasks] if isinstance(tasks, str) else tasks, include_path=include_path)
        loading = {"device": device, "dtype": dtype, **(model_args or {})}
        load: Callable[..., Any] = partial(_loaded, backend=backend) if by_path else borrowed
        with quiet_lm_eval():
            made = load(model, tokenizer, batch_size=batch_size, loading=loading, decoder=decoder)
        results: dict[str, Any] = {}
        for chosen in [names] if each is None else [[name] for name in names]:
            found = score(
                made,
                chosen,
                manager=manager,
                num_fewshot=num_fewshot,
                batch_size=batch_size,
                limit=limit,
                apply_chat_template=apply_chat_template,
                gen_kwargs=gen_kwargs,
                log_samples=log_samples,
                seed=seed,
            )
            if each is not None and found:
                each(chosen[0], found)
            results = merged(results, found)
    if not results:
        return {}
    named = {**results, "model_name": os.fspath(model) if by_path else model.name_or_path}
    if "decoder" in results["config"]:
        named["tokens_per_forward"] = results["config"]["decoder"]["tokens_per_forward"]
    if output_path is not None:
        write_results(named, output_path)
    return named


def score(
    model: Any,
    tasks: Sequence[str],
    *,
    manager: Any,
    num_fewshot: int | None = None,
    batch_size: int | str = 8,
    limit: int | float | None = None,
    apply_chat_template: bool | str = False,
    gen_kwargs: Mapping[str, Any] | str | None = None,
    log_samples: bool = False,
    seed: int = 0,
) -> dict[str, Any]:
    """lm-eval's results of an lm-eval model on what ``find_tasks`` has found; {} on every local rank but the first."""
    from lm_eval import simple_evaluate

    with quiet_lm_eval():
        results = simple_evaluate(
            model=model,
            tasks=tasks,
            task_manager=manager,
            num_fewshot=num_fewshot,
            batch_size=batch_size,
            limit=limit,
            apply_chat_template=apply_chat_template,
            gen_kwargs=dict(gen_kwargs) if isinstance(gen_kwargs, Mapping) else gen_kwargs,
            log_samples=log_samples,
            random_seed=seed,
            numpy_random_seed=seed,
            torch_random_seed=seed,
            fewshot_random_seed=seed,
        )
    return results or {}


def require_lm_eval() -> None:
    """Raises the one-line ValueError that tells how to install lm-eval when it is missing."""
    if importlib.util.find_spec("lm_eval") is None:
        raise ValueError('scoring tasks needs lm-eval: pip install "kdlib[eval]"')


def _loaded(
    model: str | os.PathLike[str],
    tokenizer: Any,
    *,
    batch_size: int | str,
    loading: Mapping[str, Any],
    decoder: Mapping[str, Any] | None,
    backend: str,
) -> Any:
    """The model of a path or Hub id as lm-eval's kind of model."""
    if backend == "vllm":
        from kdlib.eval.backends import engine_lm

        return engine_lm(os.fspath(model), batch_size=batch_size, **loading)
    if backend == "server":
        from kdlib.eval.backends import server_lm

        return server_lm(os.fspath(model), batch_size=batch_size, **loading)
    device = loading["device"] or ("cuda" if torch.cuda.is_available() else "cpu")
    options = {**loading, "device": device}
    try:
        return _kind(os.fspath(model), decoder)(os.fspath(model), tokenizer=tokenizer, batch_size=batch_size, **options)
    except OSError as error:
        raise ValueError(f"cannot load {os.fspath(model)!r}: {str(error).strip().splitlines()[0]}") from error


def borrowed(
    model: Any,
    tokenizer: Any,
    *,
    batch_size: int | str,
    loading: Mapping[str, Any] = AS_IT_IS,
    decoder: Mapping[str, Any] | None = None,
) -> Any:
    """A model object as lm-eval's kind of model; ValueError without a tokenizer, and with ``loading`` options."""
    if loading != AS_IT_IS:
        raise ValueError("device, dtype and model_args are for loading: a model object is scored as it is")
    if tokenizer is None:
        raise ValueError("a model object is scored with its tokenizer: give tokenizer=...")
    # a copy, because lm-eval adds a padding token to a tokenizer without one
    return _kind(model, decoder)(model, tokenizer=copy.deepcopy(tokenizer), batch_size=batch_size)


def _kind(model: Any, decoder: Mapping[str, Any] | None) -> Callable[..., Any]:
    """What makes lm-eval's kind of model."""
    from kdlib.eval.diffusion_config import config_of, decoder_with, is_diffusion
    from kdlib.eval.jacobi_decoder import check_options
    from kdlib.eval.models import DistilledLM, JacobiLM

    if is_diffusion(model):
        from kdlib.eval.diffusion_lm import DiffusionLM

        decoder_with(config_of(model), decoder or {})
        return partial(DiffusionLM, **(decoder or {}))
    if decoder is None:
        return DistilledLM
    check_options(decoder)
    return partial(JacobiLM, **decoder)
