"""What has to be known of a masked diffusion language model to train it and to decode with it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, get_args

Attention = Literal["full", "block_causal", "canvas"]
BlocksFrom = Literal["response", "sequence"]
EosPadding = Literal["none", "block", "length"]
BLOCK_LENGTH = 32  # of LLaDA, dParallel and d3LLM


@dataclass(frozen=True, kw_only=True)
class DiffusionSpec:
    """How a masked diffusion language model reads and is read; data alone, stored as ``diffusion`` in a model's config.json.

    mask_token_id: what stands where a token is not known yet; None only for ``canvas``, whose unknown tokens are random ones.
    shift: the hidden state at position i predicts token i + 1 (Dream); else its own token (LLaDA).
    attention: full, every token sees every other; block_causal, those of its own block and of the blocks before it; canvas,
    as DiffusionGemma: a causal encoder of the clean text and a decoder of one block of random tokens.
    block_length: tokens of a block, which block_causal and canvas need. blocks_from: where block 0 begins, at the response,
    behind a prompt that is one block of its own, or at the sequence's first token (LLaDA2, SDAR).
    eos_token_id: what ends a response and fills what is behind its end; None has none.
    eos_padding: which of that filling is learnt: none, up to a whole block, or up to the response's full length (LLaDA).
    layout: name of the checkpoint's own parameter names where they are not those of the transformers class ("llada", "dream").

    Raises ValueError for fields that do not go together.
    """

    mask_token_id: int | None
    shift: bool = False
    attention: Attention = "full"
    block_length: int | None = None
    blocks_from: BlocksFrom = "response"
    eos_token_id: int | None = None
    eos_padding: EosPadding = "length"
    layout: str | None = None

    def __post_init__(self) -> None:
        for name, choices in (("attention", Attention), ("blocks_from", BlocksFrom), ("eos_padding", EosPadding)):
            if getattr(self, name) not in get_args(choices):
                raise ValueError(f"{name} {getattr(self, name)!r}: choose {', '.join(get_args(choices))}")
        if self.mask_token_id is None and self.attention != "canvas":
            raise ValueError("a masked diffusion model needs a mask token: give mask_token_id")
        if self.attention != "full" and self.block_length is None:
            raise ValueError(f"attention {self.attention} needs block_length, the tokens of a block")
        if self.block_length is not None and self.block_length < 1:
            raise ValueError(f"block_length must be at least 1, not {self.block_length}")

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_json(content: Mapping[str, Any]) -> DiffusionSpec:
        """The spec of ``to_json``; other keys, such as the decoding settings beside it, are left alone."""
        return DiffusionSpec(**{field.name: content[field.name] for field in fields(DiffusionSpec) if field.name in content})


def block_length_of(spec: DiffusionSpec | None, *, asked: int | None = None) -> int:
    """Tokens of a block: what is ``asked`` for, else those of the model's own blocks, else BLOCK_LENGTH."""
    if asked is not None:
        return asked
    return BLOCK_LENGTH if spec is None or spec.block_length is None else spec.block_length
