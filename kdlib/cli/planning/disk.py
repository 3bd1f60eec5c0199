"""What a run writes, and what the alternatives to it would write."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor
from transformers import TrainingArguments

from kdlib.cli.planning.live import tensor_bytes
from kdlib.cli.planning.optimizer import optimizer_name, state_bytes
from kdlib.data.cache import CacheMeta, Signals
from kdlib.trainers.setup import self_teachers

CACHE_K = 64  # what kdlib cache keeps by default


def disk(trainer: Any, *, steps: int) -> dict[str, int]:
    """{what: bytes} in ``output_dir``: checkpoints as many as are there at once, and final/."""
    model, args = trainer.accelerator.unwrap_model(trainer.model), trainer.args
    trained = [x for x in model.parameters() if x.requires_grad]
    optimizer = 0 if args.save_only_model else state_bytes(trained, optimizer_name(args))
    one = _saved_weights(trainer, trained) + optimizer
    written = checkpoints(args, steps=steps)
    # a new one is whole before the oldest is deleted
    count = min(written, args.save_total_limit + 1) if args.save_total_limit else written
    numbers = sum(x.numel() for x in model.parameters())
    found = {"a checkpoint": one, "checkpoints at once": count * one}
    return {**found, "final/": numbers * trainer.published_dtype.itemsize}


def total(found: dict[str, int]) -> int:
    """Bytes in all."""
    return found["checkpoints at once"] + found["final/"]


def _saved_weights(trainer: Any, trained: list[Tensor]) -> int:
    """A whole student or an adapter; weights of a teacher made of the student, and those that rollouts are drawn with."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    own = [x for one in self_teachers(trainer.teacher) if one.keeps_weights and one.model for x in one.model.parameters()]
    rollouts = tensor_bytes(model.parameters()) if trainer.args.rollout_refresh_steps > 1 else 0
    return tensor_bytes(trained) + tensor_bytes(own) + rollouts


def checkpoints(args: TrainingArguments, *, steps: int) -> int:
    """How many a run of ``steps`` writes."""
    return _times(args.save_strategy, args.save_steps, args=args, steps=steps)


def evaluations(args: TrainingArguments, *, steps: int) -> int:
    """How often a run of ``steps`` computes the evaluation loss before its end."""
    return _times(args.eval_strategy, args.eval_steps or args.logging_steps, args=args, steps=steps)


def _times(strategy: Any, every: float, *, args: TrainingArguments, steps: int) -> int:
    name = str(getattr(strategy, "value", strategy))
    if name == "no":
        return 0
    if name == "epoch":
        return math.ceil(args.num_train_epochs) if args.max_steps <= 0 else 1
    return max(1, steps // max(1, int(every if every >= 1 else math.ceil(every * steps))))


def cache_bytes(vocab_size: int, *, k: int = CACHE_K) -> int:
    """Bytes of a token in ``kdlib cache``, as its format writes one."""
    meta = CacheMeta(
        kind="topk",
        k=min(k, vocab_size),
        vocab_size=vocab_size,
        logp_bits=16,
        temperature=1.0,
        teacher="",
        tokenizer="",
        template="",
        dataset="",
        dataset_size=1,
        rows_per_shard=1,
    )
    zeros = np.zeros((1, meta.k), dtype=np.float32)
    stored = meta.codec.encode(Signals(ids=zeros.astype(np.int32), logp=zeros, rest=zeros[:, 0]))
    return sum(array.nbytes for array in stored.values())


def free_disk(path: str | Path) -> int:
    """Bytes that are free where ``path`` will be."""
    at = Path(path).absolute()
    while not at.exists():
        at = at.parent
    return shutil.disk_usage(at).free
