"""A small auto-regressive model that says how many proposals may be committed together."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from kdlib.decoding.diffusion_step import Step, Strategy, with_best
from kdlib.decoding.strategies.scores import confidence
from kdlib.head import Head
from kdlib.models import inner, load_model


@dataclass(frozen=True, kw_only=True)
class Guided(Strategy):
    """The masked columns from the left for as long as the guide's likeliest token there is the proposal, and the surest one.

    ``guide``: a causal model of the same tokenizer, or its path (loaded once, when it is first asked). One pass of it reads the
    canvas with all proposals filled in. Guided diffusion (FlashDLM, arXiv 2505.21467); its rule of agreement is not public in
    detail, this is our reading. Raises ValueError for a path without a model.
    """

    guide: str | nn.Module

    @property
    def guide_passes(self) -> int:
        return 1

    def commits(self, step: Step) -> Tensor:
        agrees = (self._guesses(step) == step.tokens) | ~step.masked
        return with_best(agrees.long().cumprod(-1).bool(), score=confidence(step), masked=step.masked)

    def _guesses(self, step: Step) -> Tensor:
        """[b, n] the guide's likeliest token of each column of the window, given all before it."""
        guide: Any = inner(_loaded(self.guide) if isinstance(self.guide, str) else self.guide).to(step.canvas.device)
        ids = step.canvas.clone()
        row, entry = step.masked.nonzero(as_tuple=True)
        ids[row, step.start + step.column[row, entry]] = step.tokens[row, entry]
        width = step.start + int(step.column.max()) + 1
        # MASK, which a guide may not have, stands only behind the row's window, where nothing is asked
        ids = torch.where(ids < guide.get_input_embeddings().weight.shape[0], ids, 0)[:, :width]
        visible = step.visible[:, :width].long()
        positions = (visible.cumsum(-1) - 1).clamp(min=0)
        output = guide.get_decoder()(input_ids=ids, attention_mask=visible, position_ids=positions, use_cache=False)
        states, before = output.last_hidden_state, step.start + step.column - 1
        asked = states.gather(1, before[:, :, None].expand(-1, -1, states.shape[-1]))
        return Head.of(guide)(asked.flatten(0, 1)).argmax(-1).view(before.shape)


@lru_cache(maxsize=1)
def _loaded(path: str) -> nn.Module:
    return load_model(path).eval()
