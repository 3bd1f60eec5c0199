"""Rollouts by the student itself, in this process."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn

from kdlib.decoding.sampling import generate
from kdlib.head import Head
from kdlib.models import check_causal, evaluating, hidden_states
from kdlib.samplers.outcome import completion
from kdlib.types import Completion, SamplingParams

_LOGITS_AT_ONCE = 2**25


class HFSampler:
    """The live transformers (or peft) model, or a copy of it that ``load`` renews.

    batch_size: rows decoded or scored at once; None: all (scoring: 16). own_copy: generate from a copy of the weights, merged
    when there is an adapter, so that updates may go on meanwhile. autocast: makes the context that forward passes run in.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        pad_token_id: int,
        batch_size: int | None = None,
        own_copy: bool = False,
        autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ) -> None:
        check_causal(model, role="model")
        self.model = _copy_of(model) if own_copy else model
        self.pad_token_id, self.batch_size, self.own_copy, self._autocast = pad_token_id, batch_size, own_copy, autocast

    def generate(self, prompts: Sequence[list[int]], params: SamplingParams, *, seeds: Sequence[int]) -> list[Completion]:
        """One completion for each prompt; ValueError for an empty prompt or one that fills the context."""
        with evaluating(self.model), self._autocast():
            found = generate(
                self.model, prompts, params, seeds=seeds, pad_token_id=self.pad_token_id, batch_size=self.batch_size
            )
        return [completion(one.ids, one.logp, stop_ids=params.stop_ids, row=row) for row, one in enumerate(found)]

    @torch.no_grad()
    def score(self, sequences: Sequence[list[int]]) -> list[list[float]]:
        """log q(x_t | x_<t) at temperature 1, S - 1 numbers for a sequence of S tokens; [rows, V] is made in chunks."""
        order = sorted(range(len(sequences)), key=lambda row: len(sequences[row]))
        size = self.batch_size or 16
        found: dict[int, list[float]] = {}
        with evaluating(self.model):
            for start in range(0, len(order), size):
                rows = order[start : start + size]
                found.update(zip(rows, self._scored([sequences[row] for row in rows]), strict=True))
        return [found[row] for row in range(len(sequences))]

    def _scored(self, sequences: list[list[int]]) -> Iterator[list[float]]:
        device, lengths = next(self.model.parameters()).device, [len(sequence) for sequence in sequences]
        longest = max(lengths)
        ids = torch.tensor([row + [self.pad_token_id] * (longest - len(row)) for row in sequences], device=device)
        mask = (torch.arange(longest, device=device) < torch.tensor(lengths, device=device)[:, None]).long()
        with self._autocast():
            hidden, _ = hidden_states(self.model, {"input_ids": ids, "attention_mask": mask})
        scored = mask[:, 1:].bool()
        values = _label_log_probs(Head.of(self.model), hidden[:, :-1][scored], labels=ids[:, 1:][scored])
        return iter([part.tolist() for part in values.cpu().split([length - 1 for length in lengths])])

    def load(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Replaces the copy's weights; nothing for the live model, which has them already."""
        if not self.own_copy:
            return
        with torch.no_grad():
            own = self.model.state_dict()
            for name, tensor in weights:
                if name not in own:
                    raise ValueError(
                        f"the rollout copy of the student has no weight {name}: load the weights of the same model"
                    )
                own[name].copy_(tensor)

    def close(self) -> None:
        """Nothing was started."""


def _copy_of(model: nn.Module) -> nn.Module:
    """A copy for generation alone, its adapters merged into its weights."""
    twin = copy.deepcopy(model)
    if isinstance(twin, PeftModel):
        twin = twin.merge_and_unload()
    return twin.eval().requires_grad_(False)


def _label_log_probs(head: Head, hidden: Tensor, *, labels: Tensor) -> Tensor:
    """z_label - logsumexp z for each row; ``hidden`` [N, D] -> [N]."""
    chunk = max(1, _LOGITS_AT_ONCE // head.out_features)
    found = [hidden.new_zeros(0, dtype=torch.float32)]
    for rows, ids in zip(hidden.split(chunk), labels.split(chunk), strict=True):
        logits = head(rows)
        found.append(logits.gather(-1, ids[:, None])[:, 0] - logits.logsumexp(-1))
    return torch.cat(found)
