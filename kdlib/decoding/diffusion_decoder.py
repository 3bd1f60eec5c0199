"""The decoder of diffusion language models with its options, as models are sampled, evaluated and measured."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import nn

from kdlib.decoding.diffusion import DiffusionOutput, check_lengths, diffusion_generate
from kdlib.decoding.diffusion_reader import Cache
from kdlib.decoding.diffusion_step import Strategy
from kdlib.decoding.strategies import ConfidenceThreshold, EntropyThreshold, LowConfidence, strategy_json, strategy_of
from kdlib.diffusion.known import spec_of
from kdlib.diffusion.spec import BLOCK_LENGTH, DiffusionSpec
from kdlib.keys import draw_key


@dataclass(frozen=True, kw_only=True)
class DiffusionDecoder:
    """The options of ``diffusion_generate``; a row's draws follow from ``seed`` and its prompt alone."""

    gen_length: int = 256
    block_length: int = BLOCK_LENGTH
    strategy: Strategy = field(default_factory=ConfidenceThreshold)
    temperature: float = 0.0
    cache: Cache | None = None
    seed: int = 0

    def check(self) -> None:
        """ValueError for options out of range."""
        check_lengths(
            gen_length=self.gen_length, block_length=self.block_length, temperature=self.temperature, cache=self.cache
        )

    def decode(
        self,
        model: nn.Module,
        prompts: Sequence[list[int]],
        *,
        spec: DiffusionSpec,
        batch_size: int,
        stop_ids: Sequence[int] | None = None,
    ) -> Iterator[tuple[list[int], DiffusionOutput]]:
        """(numbers of the prompts, their output) batch by batch, prompts of similar length together.

        A response is the last ``gen_length`` columns of ``sequences``; errors are those of ``diffusion_generate``.
        """
        order = sorted(range(len(prompts)), key=lambda row: len(prompts[row]))
        device = next(model.parameters()).device
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            longest = max(len(prompts[row]) for row in rows)
            padding = [longest - len(prompts[row]) for row in rows]
            ids = [[0] * pad + list(prompts[row]) for pad, row in zip(padding, rows, strict=True)]
            mask = torch.arange(longest) >= torch.tensor(padding)[:, None]
            yield (
                rows,
                diffusion_generate(
                    model,
                    torch.tensor(ids, device=device),
                    spec=spec,
                    gen_length=self.gen_length,
                    block_length=self.block_length,
                    strategy=self.strategy,
                    temperature=self.temperature,
                    attention_mask=mask.long(),
                    cache=self.cache,
                    seeds=[draw_key(self.seed, *prompts[row]) for row in rows],
                    stop_ids=stop_ids,
                ),
            )

    def to_json(self) -> dict[str, Any]:
        """The options as data, which ``from_json`` reads back."""
        return {field.name: getattr(self, field.name) for field in fields(self)} | {"strategy": strategy_json(self.strategy)}

    @staticmethod
    def from_json(content: Mapping[str, Any]) -> DiffusionDecoder:
        """The decoder of ``to_json``, defaults for what is not there; ValueError for an option it does not have."""
        known = [field.name for field in fields(DiffusionDecoder)]
        if unknown := sorted(set(content) - set(known)):
            raise ValueError(f"the diffusion decoder has no option {', '.join(unknown)}: its options are {', '.join(known)}")
        strategy = {"strategy": strategy_of(content["strategy"])} if "strategy" in content else {}
        decoder = DiffusionDecoder(**{**content, **strategy})
        decoder.check()
        return decoder


def decoder_of(config: Any) -> DiffusionDecoder:
    """A model's own decoding settings, of ``diffusion.decoding`` in its configuration; the default ones for a model without,
    in blocks of the spec's length where it has one. ValueError for a configuration of no diffusion model.
    """
    spec = spec_of(config)
    written = getattr(config, "diffusion", None) or {}  # published models do not have the entry
    if "decoding" in written:
        return DiffusionDecoder.from_json(written["decoding"])
    return DiffusionDecoder() if spec.block_length is None else DiffusionDecoder(block_length=spec.block_length)


# The settings that the methods' papers and repositories report: one token a pass (LLaDA; Dream by entropy), dParallel's and
# Fast-dLLM's thresholds.
PRESETS: dict[str, DiffusionDecoder] = {
    "llada": DiffusionDecoder(strategy=LowConfidence(steps=256)),
    "dream": DiffusionDecoder(strategy=EntropyThreshold(threshold=0.0)),
    "dparallel": DiffusionDecoder(strategy=EntropyThreshold(threshold=0.45)),
    "fast-dllm": DiffusionDecoder(strategy=ConfidenceThreshold(threshold=0.9), cache="dual"),
}
