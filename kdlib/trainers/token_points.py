"""Token vectors, between which sample-wise transport takes its costs."""

from __future__ import annotations

from pathlib import Path

import torch
from accelerate import Accelerator
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from kdlib.objectives.sinkhorn import TokenPoints
from kdlib.teachers import HFTeacher, leaves
from kdlib.tokenizers import surface_vectors
from kdlib.types import Teacher


def token_points(
    source: str,
    *,
    teacher: Teacher | None,
    tokenizer: PreTrainedTokenizerBase,
    vocab_size: int,
    device: torch.device,
) -> TokenPoints | None:
    """What ``Sinkhorn.token_points`` names, [V, F] on the device; None for the student's, which change in training.

    Raises ValueError where it names nothing, the teacher has no embeddings here, a file holds no vectors, or they are of
    another vocabulary; FileNotFoundError for a file that does not exist.
    """
    if source == "student":
        return None
    if source == "surface":
        return TokenPoints(student=surface_vectors(tokenizer, vocab_size=vocab_size).to(device))
    found = _of_teacher(teacher) if source == "teacher" else _of_file(source)
    if found.ndim != 2 or len(found) < vocab_size:
        raise ValueError(
            f"token_points {source} has shape {list(found.shape)}, the tokenizer has {vocab_size} tokens: "
            "give one vector for each token of its own vocabulary"
        )
    return TokenPoints(student=found[:vocab_size].to(device))


def check_token_points(source: str, accelerator: Accelerator) -> None:
    """ValueError where the student's embeddings are in parts."""
    if source == "student" and accelerator.distributed_type == "FSDP":
        raise ValueError("token_points student needs whole embeddings, FSDP keeps them in parts: use teacher, surface or ddp")


def _of_teacher(teacher: Teacher | None) -> Tensor:
    members = leaves(teacher)
    if len(members) != 1 or not isinstance(members[0], HFTeacher):
        raise ValueError(
            "token_points teacher reads the embeddings of a single teacher in this process: "
            "set objective.token_points to student, surface or a .safetensors file"
        )
    weight: Tensor = members[0].model.get_input_embeddings().weight  # type: ignore[operator]
    if weight.is_meta:
        raise ValueError("token_points teacher: its embeddings are offloaded; use surface, student or a .safetensors file")
    return weight.detach()


def _of_file(source: str) -> Tensor:
    if not source.endswith(".safetensors"):
        raise ValueError(f"token_points is teacher, student, surface or a .safetensors file, not {source!r}")
    if not Path(source).is_file():
        raise FileNotFoundError(f"no file {source} (token_points)")
    try:
        tensors: dict[str, Tensor] = load_file(source)
    except SafetensorError as error:
        raise ValueError(f"token_points {source} cannot be read as safetensors: {error}") from error
    if len(tensors) != 1:
        raise ValueError(f"{source} holds {len(tensors)} tensors ({', '.join(sorted(tensors))}): token_points needs one [V, F]")
    found = next(iter(tensors.values()))
    if not found.is_floating_point() or not found.float().isfinite().all():
        raise ValueError(f"token_points {source} must hold finite floating-point numbers")
    return found
