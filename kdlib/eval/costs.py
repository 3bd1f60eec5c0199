"""What a draft's and a target's forward passes cost, measured with a filled key-value cache."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from transformers import DynamicCache, PreTrainedModel

from kdlib.models import evaluating

_TOKEN = 1  # which token is read does not matter to the time


@dataclass(frozen=True, kw_only=True)
class Costs:
    """Median seconds of a forward pass of ``batch_size`` rows at ``context`` cached tokens.

    ``target_step`` and ``draft_step`` read one token of each row, ``verify[gamma]`` gamma + 1 in one pass of the target.
    """

    target_step: float
    draft_step: float
    verify: dict[int, float]
    context: int
    batch_size: int
    repeats: int

    @property
    def c(self) -> float:
        """The draft's step in units of the target's."""
        return self.draft_step / self.target_step

    @property
    def v(self) -> dict[int, float]:
        """{gamma: the target's pass over gamma + 1 tokens in units of its step}."""
        return {gamma: seconds / self.target_step for gamma, seconds in self.verify.items()}


@torch.inference_mode()
def measure_costs(
    target: PreTrainedModel,
    draft: PreTrainedModel,
    *,
    gammas: Sequence[int],
    context: int,
    batch_size: int = 1,
    repeats: int = 20,
) -> Costs:
    """Medians of ``repeats`` measurements after a warm-up, as a round makes the passes: the draft's step is the mean of
    max(gammas) in a row, the target's too. Logits of all new tokens are computed; sampling is not counted.

    What is measured takes turns, so that a slow moment of the machine hits all of it; after each the cache is cropped back to
    ``context`` tokens. GPUs are waited for. Models come back in the mode they were in. ValueError for a context too long.
    """
    if not gammas or min(gammas) < 1:
        raise ValueError(f"numbers of drafted tokens are at least 1, not {list(gammas)}")
    run = max(gammas)
    with evaluating(target, draft):
        verifier, drafter = (_Filled(model, context=context, batch_size=batch_size, room=run + 1) for model in (target, draft))
        seconds = _medians(
            {
                "target": lambda: verifier.seconds(1, times=run),
                "draft": lambda: drafter.seconds(1, times=run),
                **{f"verify {gamma}": lambda gamma=gamma: verifier.seconds(gamma + 1) for gamma in gammas},  # type: ignore[misc]
            },
            repeats=repeats,
        )
    return Costs(
        target_step=seconds["target"],
        draft_step=seconds["draft"],
        verify={gamma: seconds[f"verify {gamma}"] for gamma in gammas},
        context=context,
        batch_size=batch_size,
        repeats=repeats,
    )


class _Filled:
    """A model that has read ``context`` tokens of each of ``batch_size`` rows and may read up to ``room`` more."""

    def __init__(self, model: PreTrainedModel, *, context: int, batch_size: int, room: int) -> None:
        limit = model.config.get_text_config().to_dict().get("max_position_embeddings")
        if context < 1 or (limit is not None and context + room > limit):
            most = "" if limit is None else f" and at most {limit - room}"
            raise ValueError(f"a context of {context} tokens cannot be timed: it is at least 1{most} for this model")
        self._model, self._cache = model, DynamicCache(config=model.config)
        self._ids = torch.full((batch_size, room), _TOKEN, device=model.device)
        filled = torch.full((batch_size, context), _TOKEN, device=model.device)
        model(input_ids=filled, past_key_values=self._cache, use_cache=True, logits_to_keep=1)
        self._cache.activate_past_recording()  # a sliding window can be cropped back only when it keeps what left it

    def seconds(self, tokens: int, *, times: int = 1) -> float:
        """Of a pass over ``tokens`` new ones, the mean of ``times`` passes in a row; the cache is as it was afterwards."""
        self._wait()
        start = time.perf_counter()
        for _ in range(times):
            self._model(input_ids=self._ids[:, :tokens], past_key_values=self._cache, use_cache=True)
        self._wait()
        taken = time.perf_counter() - start
        self._cache.crop(-tokens * times)
        return taken / times

    def _wait(self) -> None:
        if self._model.device.type == "cuda":
            torch.cuda.synchronize(self._model.device)


def _medians(jobs: dict[str, Callable[[], float]], *, repeats: int) -> dict[str, float]:
    warm_up = max(3, repeats // 5)
    rounds = [{name: job() for name, job in jobs.items()} for _ in range(warm_up + repeats)]
    return {name: statistics.median(taken[name] for taken in rounds[warm_up:]) for name in jobs}
