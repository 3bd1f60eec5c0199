"""The Jacobi decoder with its options, as it is measured and scored."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn

from kdlib.data.draft import sample_id
from kdlib.decoding.jacobi import JacobiOutput, jacobi_generate
from kdlib.decoding.jacobi_init import Init
from kdlib.decoding.jacobi_options import JacobiOptions
from kdlib.keys import draw_key


@dataclass(frozen=True, kw_only=True)
class JacobiDecoder:
    """The options of ``jacobi_generate``; the random numbers of ``init="random"`` follow from ``seed`` and the prompt alone."""

    block_size: int = 16
    init: Init = "prompt"
    max_iterations: int | None = None
    sliding_window: bool = False
    blocks: int = 1
    spawn_ratio: float = 0.85
    pool: int = 0
    seed: int = 0

    @property
    def keeps_trajectories(self) -> bool:
        """Whether every block is iterated by itself and to its fixed point."""
        return self.max_iterations is None and not self.sliding_window and self.blocks == 1 and self.pool == 0

    @property
    def _options(self) -> dict[str, Any]:
        return {field.name: getattr(self, field.name) for field in fields(self) if field.name != "seed"}

    def check(self, *, max_new_tokens: int) -> None:
        """ValueError for options out of range, and for those that do not go together."""
        JacobiOptions(max_new_tokens=max_new_tokens, **self._options)

    def run(
        self,
        model: nn.Module,
        input_ids: Tensor,
        *,
        attention_mask: Tensor,
        max_new_tokens: int,
        stop_ids: Sequence[int] | None = None,
        pad_token_id: int | None = None,
        return_trajectories: bool = False,
    ) -> JacobiOutput:
        """Continues left-padded ``input_ids`` [B, S]; errors are those of ``jacobi_generate``."""
        rows = [ids[mask.bool()].tolist() for ids, mask in zip(input_ids, attention_mask, strict=True)]
        return jacobi_generate(
            model,
            input_ids,
            attention_mask=attention_mask,
            max_new_tokens=max_new_tokens,
            seeds=[draw_key(self.seed, sample_id(ids, [])) for ids in rows],
            stop_ids=stop_ids,
            pad_token_id=pad_token_id,
            return_trajectories=return_trajectories,
            **self._options,
        )

    def to_json(self) -> dict[str, Any]:
        """The options; an ``init`` of the caller's own by its name."""
        return {**asdict(self), "init": self.init if isinstance(self.init, str) else self.init.__name__}


def check_options(options: Mapping[str, Any]) -> None:
    """ValueError for an option that the decoder does not have."""
    known = [field.name for field in fields(JacobiDecoder)]
    if unknown := sorted(set(options) - set(known)):
        raise ValueError(f"the Jacobi decoder has no option {', '.join(unknown)}: its options are {', '.join(known)}")


@dataclass(frozen=True, kw_only=True)
class Request:
    """What is asked of a model: ``max_new_tokens``, the stop token included, up to any of ``stop_ids``."""

    model: Any
    max_new_tokens: int
    stop_ids: tuple[int, ...]
    pad_token_id: int
    batch_size: int

    def decode(
        self, decoder: JacobiDecoder, prompts: Sequence[list[int]], *, return_trajectories: bool = False
    ) -> Iterator[tuple[list[int], JacobiOutput]]:
        """(numbers of the prompts, their output) batch by batch, prompts of similar length together."""
        order = sorted(range(len(prompts)), key=lambda row: len(prompts[row]))
        device = next(self.model.parameters()).device
        for start in range(0, len(order), self.batch_size):
            rows = order[start : start + self.batch_size]
            longest = max(len(prompts[row]) for row in rows)
            padding = [longest - len(prompts[row]) for row in rows]
            ids = [[self.pad_token_id] * pad + prompts[row] for pad, row in zip(padding, rows, strict=True)]
            mask = torch.arange(longest) >= torch.tensor(padding)[:, None]
            yield (
                rows,
                decoder.run(
                    self.model,
                    torch.tensor(ids, device=device),
                    attention_mask=mask.long().to(device),
                    max_new_tokens=self.max_new_tokens,
                    stop_ids=self.stop_ids,
                    pad_token_id=self.pad_token_id,
                    return_trajectories=return_trajectories,
                ),
            )
