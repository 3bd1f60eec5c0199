"""The options of training masked diffusion language models."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

from kdlib.diffusion.masking import KINDS, Masking
from kdlib.diffusion.spec import Attention, DiffusionSpec, EosPadding, block_length_of
from kdlib.trainers.config import DistillationConfig

Kind = Literal["auto", "uniform", "response", "blocks", "per_block", "monotone", "trajectory"]
Context = Literal["noisy", "clean"]


@dataclass
class DiffusionConfig(DistillationConfig):
    """DistillationConfig with the options of masked diffusion models.

    Args:
        mask_token: the mask token of a model that has none yet, for example <|mask|>; it is added to the tokenizer.
        shift: the hidden state at a position predicts the next token, as in models made of auto-regressive ones (Dream); null
            takes what the model's configuration says, and false for a new one.
        attention: full or block_causal (blocks see themselves and the blocks before them); null takes the model's own.
        context: with block_causal, what a block sees of the blocks before it: noisy, as they are masked in the same view
            (D2F), or clean, their text, in a second stream (BD3LM), as decoding block by block does.
        block_length: tokens of a block, for masking by blocks, block_causal attention and eos_padding block; null takes the
            model's own, and 32 for one without blocks.
        masking: which tokens of a response are masked: uniform (a share drawn from 0 to 1 for each row: LLaDA), response
            (the share mask_ratio of it), blocks (of one block, what follows is masked whole: dParallel), per_block (a share
            drawn for each block: BD3LM), monotone (shares that rise from block to block: D2F) or trajectory (one block, in the
            order in which the teacher committed it: d3LLM); auto takes what the objective was published with.
        mask_ratio: with response and blocks, the share of tokens masked.
        ratio_range: with trajectory, the smallest and largest share; the smallest rises to the largest over training.
        block_schedule: with trajectory and blocks, the block lengths of equal parts of training, for example [16, 24, 32].
        eos_padding: what is learnt behind a response's end: none, block (end tokens up to a whole block) or length (up to
            response_length tokens); null takes the model's own, and length for a new one.
        response_length: with eos_padding length, the tokens of a response with its padding; null pads rows to max_length.
    """

    mask_token: str | None = None
    shift: bool | None = None
    attention: Literal["full", "block_causal"] | None = None
    context: Context = "noisy"
    block_length: int | None = None
    masking: Kind = "auto"
    mask_ratio: float = 0.5
    ratio_range: tuple[float, float] = (0.0, 0.8)
    block_schedule: list[int] | None = None
    eos_padding: EosPadding | None = None
    response_length: int | None = None

    def _refuse(self) -> None:
        super()._refuse()
        for name, choices in (("context", get_args(Context)), ("masking", ("auto", *KINDS))):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} {getattr(self, name)!r}: choose {', '.join(choices)}")
        if self.packing:
            raise ValueError("packing puts samples into one row, which a diffusion model would read as one text: leave it out")
        if self.on_policy_fraction:
            raise ValueError("rollouts are drawn token by token: write trajectories with kdlib trajectories diffusion instead")
        if self.response_length is not None and self.response_length < 1:
            raise ValueError(f"response_length must be at least 1, not {self.response_length}")
        self.masks("uniform", block_length=self.blocks(None))

    def blocks(self, known: DiffusionSpec | None) -> int:
        """Tokens of a block for a model that is ``known``, or for a new one."""
        return block_length_of(known, asked=self.block_length)

    def masks(self, kind: str, *, block_length: int) -> Masking:
        """The way of masking; ``kind`` is that of the objective where ``masking`` is auto."""
        return Masking(
            kind=kind if self.masking == "auto" else self.masking,
            mask_ratio=self.mask_ratio,
            ratio_range=(self.ratio_range[0], self.ratio_range[1]),
            block_length=block_length,
            block_schedule=None if self.block_schedule is None else tuple(self.block_schedule),
        )

    def spec(self, known: DiffusionSpec | None, *, mask_token_id: int | None, eos_token_id: int | None) -> DiffusionSpec:
        """The spec of the trained model: what is ``known`` of it, a new one otherwise, with what the options change."""
        given = {"shift": self.shift, "attention": self.attention, "eos_padding": self.eos_padding}
        found: dict[str, Any] = (
            {"mask_token_id": mask_token_id, "eos_token_id": eos_token_id} if known is None else known.to_json()
        )
        found |= {name: value for name, value in given.items() if value is not None}
        attention: Attention = found.get("attention", "full")
        if attention == "block_causal":
            found["block_length"] = self.blocks(known)
        return DiffusionSpec(**found)
