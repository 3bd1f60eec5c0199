"""A transformers model in this process as the teacher."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers import BitsAndBytesConfig, PreTrainedTokenizerBase

from kdlib.data.positions import teacher_inputs
from kdlib.head import Head
from kdlib.models import check_head, hidden_states, load_model, load_tokenizer
from kdlib.types import Positions, Support, TeacherSignal


class HFTeacher:
    """Hidden states of the scored positions and the head that turns them into logits; [N, V] is never built here.

    model: a path, a Hub id or a loaded causal language model (frozen and put into eval mode).
    dtype, attn_implementation, device_map, revision, trust_remote_code, load_in_8bit, load_in_4bit: how a path is loaded.
    tokenizer: defaults to the one beside the model, None when there is none to be found.
    vocab_size: cut the head to this many entries (the tokenizer's length), set by the trainer.
    """

    provides = Support.FULL

    def __init__(
        self,
        model: str | nn.Module,
        *,
        tokenizer: PreTrainedTokenizerBase | None = None,
        dtype: str | torch.dtype = "auto",
        attn_implementation: str | None = None,
        device_map: Any = None,
        revision: str | None = None,
        trust_remote_code: bool = False,
        load_in_8bit: bool = False,
        load_in_4bit: bool = False,
        vocab_size: int | None = None,
    ) -> None:
        if isinstance(model, str):
            self.name = model
            loaded: nn.Module = load_model(
                model,
                dtype=dtype,
                attn_implementation=attn_implementation,
                quantization_config=quantization(load_in_8bit=load_in_8bit, load_in_4bit=load_in_4bit),
                device_map=device_map,
                revision=revision,
                trust_remote_code=trust_remote_code,
            )
            tokenizer = tokenizer or load_tokenizer(self.name, revision=revision, trust_remote_code=trust_remote_code)
        else:
            loaded = model
            self.name = str(model.config.name_or_path or type(model).__name__)  # type: ignore[union-attr]
        self.tokenizer, self.vocab_size = tokenizer, vocab_size
        self.model = loaded.eval().requires_grad_(False)
        self._placed = device_map is not None
        check_head(self.model, role="teacher")

    def place(self, device: torch.device) -> None:
        """Moves the model to the student's device, unless a device map or quantisation has placed it."""
        if not self._placed and not getattr(self.model, "is_quantized", False):
            self.model.to(device)

    @torch.no_grad()
    def signal(self, batch: Mapping[str, Any], positions: Positions, layers: tuple[int, ...] = ()) -> TeacherSignal:
        """TeacherSignal(hidden [N, Dt], head) of the rows, on the device of ``positions``, from ``teacher_inputs``."""
        device = positions.index.device
        source = next(self.model.parameters()).device
        inputs, index = teacher_inputs(batch, positions)
        moved = {key: value.to(source) if isinstance(value, torch.Tensor) else value for key, value in inputs.items()}
        hidden, features = hidden_states(self.model, moved, layers=layers)
        rows = hidden.flatten(0, 1).index_select(0, index.to(hidden.device)).to(device)
        return TeacherSignal(hidden=rows, head=self._head(device), features={k: v.to(device) for k, v in features.items()})

    def _head(self, device: torch.device) -> Head:
        return Head.of(self.model, vocab_size=self.vocab_size).to(device)


def quantization(*, load_in_8bit: bool, load_in_4bit: bool) -> BitsAndBytesConfig | None:
    """The bitsandbytes configuration for 8 or 4 bits (NF4, computing in bf16), or None."""
    if not load_in_8bit and not load_in_4bit:
        return None
    if load_in_8bit and load_in_4bit:
        raise ValueError("load_in_8bit and load_in_4bit exclude each other")
    return BitsAndBytesConfig(
        load_in_8bit=load_in_8bit,
        load_in_4bit=load_in_4bit,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
