"""What an optimizer keeps of every trained number, and what its step needs beside that."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor
from transformers import TrainingArguments
from transformers.training_args import OptimizerNames

from kdlib.cli.planning.live import tensor_bytes

# Moments that an optimizer keeps of each trained number, by the beginning of its name; AdamW and what is not listed: 2.
MOMENTS = {"sgd": 0, "adagrad": 1, "rmsprop": 1, "lion": 1, "paged_lion": 1, "ademamix": 3, "paged_ademamix": 3}
# A moment in 8 bits: a byte, and a float32 scale for 256 of them (bitsandbytes).
EIGHT_BIT = 1 + 4 / 256


def optimizer_name(args: TrainingArguments) -> str:
    """The option ``optim`` as users write it."""
    return args.optim.value if isinstance(args.optim, OptimizerNames) else str(args.optim)


def state_bytes(trained: Iterable[Tensor], optim: str) -> int:
    """Bytes of an optimizer's state, by the option ``optim``."""
    if optim == "adafactor":  # a row and a column of each matrix, in float32
        return sum(4 * sum(x.shape) if x.ndim > 1 else 4 * x.numel() for x in trained)
    moments = next((count for start, count in MOMENTS.items() if optim.startswith(start)), 2)
    if "8bit" in optim:
        return int(sum(moments * EIGHT_BIT * x.numel() for x in trained))
    return sum(moments * x.numel() * x.element_size() for x in trained)


def update_bytes(trained: list[Tensor], optim: str, *, device: str) -> int:
    """Temporaries of the optimizer's step: none of a fused one, one more set on a GPU, where all tensors go at once."""
    if "fused" in optim or not trained:
        return 0
    if optim == "adamw_torch" and device == "cuda":
        return tensor_bytes(trained)
    return 2 * max(x.numel() * x.element_size() for x in trained)
