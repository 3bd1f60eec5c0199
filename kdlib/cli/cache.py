"""``kdlib cache``: a teacher's signals on disk, so that training does without its weights and time."""

from __future__ import annotations

import json
import shlex
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

from rich.console import Console

from kdlib.cli.hub.arguments import DataHubArguments
from kdlib.cli.parsing import parse

DESCRIPTION = """Writes a teacher's top-k (or sampled, or given tokens') log-probs at the scored positions of a dataset;
then --teacher DIR trains on them.

An interrupted writing continues with the same command."""


@dataclass
class CacheArguments:
    """Which teacher speaks about which rows, and how much of it is kept.

    Args:
        teacher: the teacher, a path, Hub id, or URL of a vLLM server (hidden or topk, for kind given any).
        dataset_name: rows, as for kdlib distill.
        output_dir: the directory to write.
        dataset_config: configuration name of a Hub dataset.
        dataset_train_split: split of the rows.
        k: how many log-probs per token are kept (or drawn); not for kind given, which keeps one.
        kind: topk keeps the k likeliest and the mass outside; sampled draws k ids from the teacher; given keeps the log-prob
            of the token that is in the row, for objectives that score likelihoods of text across tokenizers.
        bits: 32, 16 or 8 bits per log-prob; the error of 8 and 16 bits is measured and written down.
        temperature: the temperature the signals are captured at; the objective must use the same.
        max_length: rows longer than this keep their first max_length tokens; use the same in training.
        packing: prepare packed rows; a cache serves packed and unpacked training alike.
        skip_bad_rows: drop rows that cannot be trained on instead of stopping.
        chat_template_kwargs: passed to the chat template; use the same in training.
        batch_size: rows at a time.
        teacher_checkpoint: path or Hub id of what the teacher's URL serves, where the server's own name for it is neither.
        dtype: the teacher's weights, auto (as saved), float32 or bfloat16.
        attn_implementation: sdpa, eager, flash_attention_2 or another of transformers.
        device: cpu, cuda or cuda:N; chosen when left out.
        load_in_8bit: load the teacher in 8 bits (needs bitsandbytes).
        load_in_4bit: load the teacher in 4 bits (needs bitsandbytes).
        trust_remote_code: run the code that a model on the Hub brings. Off unless you have read it.
        seed: of the draws of kind sampled.
    """

    teacher: str
    dataset_name: str
    output_dir: str
    dataset_config: str | None = None
    dataset_train_split: str = "train"
    k: int = 64
    kind: Literal["topk", "sampled", "given"] = "topk"
    bits: Literal[32, 16, 8] = 16
    temperature: float = 1.0
    max_length: int = 1024
    packing: bool = False
    skip_bad_rows: bool = False
    chat_template_kwargs: dict[str, Any] | None = None
    batch_size: int = 8
    dtype: str = "auto"
    attn_implementation: str | None = None
    teacher_checkpoint: str | None = None
    device: str | None = None
    load_in_8bit: bool = False
    load_in_4bit: bool = False
    trust_remote_code: bool = False
    seed: int = 0


def run(words: list[str]) -> int:
    options = parse("cache", DESCRIPTION, [CacheArguments, DataHubArguments], words)
    if options is None:
        return 0
    a, hub = options.build(CacheArguments), options.build(DataHubArguments)
    _check_directory(Path(a.output_dir))
    hub.check(a.teacher_checkpoint or a.teacher)
    index = _write(a)
    size = sum(shard.bytes for shard in index.shards)
    tokens = sum(shard.tokens for shard in index.shards)
    console = Console(soft_wrap=True, highlight=False)
    console.print(
        f"{a.output_dir}: {tokens:,} tokens, {size / max(1, tokens):.1f} bytes a token, k={index.meta.k}, {a.kind}",
        markup=False,
    )
    for line in [*hub.push(Path(a.output_dir)), f"next    {_next_command(a)}"]:
        console.print(line, markup=False)
    return 0


def _next_command(a: CacheArguments) -> str:
    """The training that reads this cache: the same rows, cut at the same length, and an objective that it feeds."""
    same = {name: getattr(a, name) for name in ("dataset_name", "dataset_config", "dataset_train_split", "max_length")}
    default = {field.name: field.default for field in fields(a)}
    words = [word for name, value in same.items() if value != default[name] for word in (f"--{name}", str(value))]
    if a.chat_template_kwargs:
        words += ["--chat_template_kwargs", json.dumps(a.chat_template_kwargs)]
    if a.kind == "given":
        words += ["--objective", "ALM", "--objective.debias", "false", "--objective.threshold", "0"]
    return shlex.join(["kdlib", "distill", "--teacher", a.output_dir, *words, "--model", "STUDENT", "--output_dir", "OUT"])


def _check_directory(path: Path) -> None:
    """ValueError when a cache would be written among other files."""
    if path.is_dir() and any(path.iterdir()) and not (path / "cache.json").is_file():
        raise ValueError(f"{path} is not empty and holds no cache: choose another --output_dir")


def _write(a: CacheArguments) -> Any:
    import torch

    from kdlib.data import load_rows, prepare_dataset
    from kdlib.teachers import HFTeacher, VLLMTeacher, resolve_teacher
    from kdlib.teachers.write_cache import write_cache

    rows = load_rows(a.dataset_name, split=a.dataset_train_split, config=a.dataset_config)
    device = torch.device(a.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    loading = {"dtype": a.dtype, "trust_remote_code": a.trust_remote_code}
    quantized = {"load_in_8bit": a.load_in_8bit, "load_in_4bit": a.load_in_4bit}
    served = {**loading, "k": 1 if a.kind == "given" else a.k, "model": a.teacher_checkpoint}
    options = {**loading, **quantized, "attn_implementation": a.attn_implementation, "served": served}
    teacher = resolve_teacher(a.teacher, options)
    if a.kind == "given" and isinstance(teacher, VLLMTeacher) and teacher.kind == "topk":
        teacher = resolve_teacher(a.teacher, {**options, "served": {**served, "signal": "sampled"}})
    if not isinstance(teacher, HFTeacher | VLLMTeacher):
        raise ValueError(f"teacher {a.teacher} is a cache already: give the model, or the URL that serves it")
    if isinstance(teacher, HFTeacher):
        teacher.place(device)
    assert teacher.tokenizer is not None
    prepared = prepare_dataset(
        rows,
        teacher.tokenizer,
        max_length=a.max_length,
        packing=a.packing,
        skip_bad_rows=a.skip_bad_rows,
        chat_template_kwargs=a.chat_template_kwargs,
    )
    return write_cache(
        teacher,
        prepared.dataset,
        directory=a.output_dir,
        tokenizer=teacher.tokenizer,
        teacher_name=a.teacher,
        k=a.k,
        kind=a.kind,
        bits=a.bits,
        temperature=a.temperature,
        batch_size=a.batch_size,
        chat_template_kwargs=a.chat_template_kwargs,
        seed=a.seed,
        device=device,
    )
