"""The loop of speculative decoding: prompts, rounds, and what is counted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kdlib.decoding.cache import CachedModel
from kdlib.decoding.drafters import Drafter
from kdlib.decoding.emitted import Emitted
from kdlib.decoding.sampling import context_length, draw, filtered_log_probs, uniforms
from kdlib.decoding.spec_verify import Round
from kdlib.types import SamplingParams


@dataclass(frozen=True, kw_only=True)
class SpeculativeOutput:
    """Tokens, and counters that count as vLLM's do: rounds are counted whole, also where a stop or the limit cuts off tokens.

    ``sequences`` [B, S + max_new_tokens]: prompt, new tokens, then padding; ``lengths`` [B]: new tokens, the stop token
    included. The first new token comes from the prompt's forward pass and belongs to no round. ``rounds`` [B]: passes of the
    target that verified a row; ``drafted`` [B]: proposals verified; ``accepted_per_position`` [B, gamma]: how often position i
    and all before it were accepted (unconditional); ``forwards``: passes of the target over the batch, without the prompt's.
    ``lossless``: whether tokens come from the target's own distribution (lenience 1).
    """

    sequences: Tensor
    lengths: Tensor
    rounds: Tensor
    drafted: Tensor
    accepted_per_position: Tensor
    forwards: int
    lossless: bool

    @property
    def acceptance_rate(self) -> float:
        """Accepted / drafted over all rows; NaN when nothing was drafted."""
        drafted = int(self.drafted.sum())
        return int(self.accepted_per_position.sum()) / drafted if drafted else float("nan")

    @property
    def acceptance_length(self) -> float:
        """Tokens per verify round over all rows, the target's own included: 1 + accepted / rounds; NaN without a round."""
        rounds = int(self.rounds.sum())
        return 1 + int(self.accepted_per_position.sum()) / rounds if rounds else float("nan")


class Speculation:
    """One call's state: ``emitted.rows`` [b] are the prompts still going on; what has a B in its shape is of all prompts.

    Random numbers are a table [B, max_tokens, 2 gamma + 1]: those of a row's i-th pass depend on its seed and on i alone.
    """

    def __init__(
        self,
        target: Any,
        drafter: Drafter,
        *,
        params: SamplingParams,
        gamma: int,
        one_hot: bool,
        lenience: float,
        seeds: Sequence[int],
    ) -> None:
        self.target, self.drafter, self.params, self.gamma = target, drafter, params, gamma
        self.one_hot, self.lenience = one_hot, lenience
        self.device = next(target.parameters()).device
        self.context = context_length(target)
        shape = (len(seeds), params.max_tokens, 2 * gamma + 1)
        if params.temperature == 0:
            self.uniform = torch.zeros((), device=self.device).expand(shape)
        else:
            self.uniform = torch.stack([uniforms(seed, shape[1] * shape[2]) for seed in seeds]).view(shape).to(self.device)

    def run(self, input_ids: Tensor, *, padding: Tensor, pad_token_id: int) -> SpeculativeOutput:
        """Continues ``input_ids`` [B, S], of which ``padding`` [B] (CPU) columns on the left are unused."""
        self._reset(input_ids, padding=padding)
        if self._start(input_ids, padding=padding):
            while self._round():
                pass
        return SpeculativeOutput(
            sequences=self.emitted.sequences(input_ids, pad_token_id=pad_token_id),
            lengths=self.emitted.lengths,
            rounds=self.rounds,
            drafted=self.drafted,
            accepted_per_position=self.accepted,
            forwards=self.forwards,
            lossless=self.lenience == 1,
        )

    def _reset(self, input_ids: Tensor, *, padding: Tensor) -> None:
        size, columns = input_ids.shape
        self.prompt = (columns - padding).to(self.device)
        self.emitted = Emitted(
            self.prompt,
            max_tokens=self.params.max_tokens,
            context=self.context,
            stop_ids=self.params.stop_ids,
            spare=self.gamma,
        )
        self.rounds, self.drafted = torch.zeros_like(self.prompt), torch.zeros_like(self.prompt)
        self.accepted = self.prompt.new_zeros(size, self.gamma)
        self.forwards = 0

    def _start(self, input_ids: Tensor, *, padding: Tensor) -> bool:
        """Reads the prompts and chooses each row's first token; whether any row goes on."""
        self.cached = CachedModel(self.target, padding=padding, layers=self.drafter.layers)
        logits, features = self.cached.read(input_ids, logits_to_keep=1)
        logp = filtered_log_probs(logits[:, -1], self.params)
        first = logp.argmax(-1) if self.params.temperature == 0 else draw(logp, self.uniform[:, 0, -1])
        nothing = torch.zeros_like(first)
        kept, _ = self.emitted.take(first[:, None], accepted=nothing, beside=nothing[:, None])
        if len(kept) == 0:
            return False
        self.cached.go_back(kept, tokens=torch.zeros_like(kept))
        alive, unused = kept.to(self.device), int(padding[kept].min())
        self.last = first[alive]
        self.drafter.start(
            torch.cat([input_ids, first[:, None]], dim=1)[alive, unused:],
            padding=padding[kept] - unused,
            features={layer: states[alive, unused:] for layer, states in features.items()},
        )
        return True

    def _round(self) -> bool:
        """Proposals, their verification, and what follows from it; whether any row goes on."""
        self.forwards += 1
        uniform = self.uniform[self.emitted.rows, self.forwards]
        choices = Round(self.params, uniform=uniform, one_hot=self.one_hot, lenience=self.lenience)
        self.drafter.propose(self.gamma, choices.choose)
        proposals, room = choices.proposals(), self._room()
        logits, features = self.cached.read(torch.cat([self.last[:, None], proposals], dim=1))
        accepted, follows = choices.verify(logits, room=room)
        self._count(accepted, room=room)
        tokens = torch.cat([proposals, follows[:, None]], dim=1).scatter(1, accepted[:, None], follows[:, None])
        kept, beside = self.emitted.take(tokens, accepted=accepted, beside=accepted[:, None])
        if len(kept) == 0:
            return False
        accepted = beside[:, 0]
        self.cached.go_back(kept, tokens=self.gamma - accepted)
        alive = kept.to(self.device)
        self.last = follows[alive]
        features = {layer: states[alive] for layer, states in features.items()}
        self.drafter.commit(tokens[alive], accepted=accepted, rows=kept, features=features)
        return True

    def _room(self) -> Tensor:
        """How many proposals of each row may be verified [b]: the target reads them, the draft all but the last of them."""
        known = (self.prompt + self.emitted.lengths)[self.emitted.rows]
        return (min(self.context, self.drafter.context + 1) - known).clamp(min=0, max=self.gamma).long()

    def _count(self, accepted: Tensor, *, room: Tensor) -> None:
        rows = self.emitted.rows
        self.rounds[rows] += 1
        self.drafted[rows] += room
        self.accepted[rows] += torch.arange(self.gamma, device=self.device) < accepted[:, None]
