"""Rollouts by a vLLM engine in this process."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kdlib.decoding.sampling import check_prompts
from kdlib.samplers.config import RolloutConfig
from kdlib.samplers.outcome import completion, own_log_probs
from kdlib.serving.engine import start_engine, stop_engine
from kdlib.serving.scoring import EngineScorer
from kdlib.types import Completion, SamplingParams


class VLLMSampler:
    """A vllm.LLM of ``checkpoint`` (a directory or Hub id); it has the checkpoint's weights until ``load`` is called.

    dtype: auto (as saved), float32 or bfloat16. With ``config.sleep`` the engine's memory is freed after every ``generate`` and
    taken again by whatever comes next.
    """

    def __init__(
        self,
        checkpoint: str | os.PathLike[str],
        config: RolloutConfig,
        *,
        dtype: str = "auto",
        seed: int = 0,
        trust_remote_code: bool = False,
    ) -> None:
        if config.sleep and not torch.cuda.is_available():
            raise ValueError("rollout.sleep frees the memory of a GPU, and there is none here: leave it out")
        self.config, self._asleep = config, False
        self.engine = start_engine(
            os.fspath(checkpoint),
            dtype=dtype,
            max_model_len=config.max_model_len,
            gpu_memory_utilization=config.gpu_memory_utilization,
            enforce_eager=config.enforce_eager,
            seed=seed,
            logprobs_mode="processed_logprobs",
            enable_sleep_mode=config.sleep,
            trust_remote_code=trust_remote_code,
        )
        self._scorer = EngineScorer(self.engine, name=Path(checkpoint).name)

    def generate(self, prompts: Sequence[list[int]], params: SamplingParams, *, seeds: Sequence[int]) -> list[Completion]:
        """One completion for each prompt; ValueError for an empty prompt or one that fills the context."""
        check_prompts(prompts, context=self.engine.llm_engine.model_config.max_model_len)
        self._wake()
        requests = [{"prompt_token_ids": prompt} for prompt in prompts]
        settings = [self._settings(params, seed=seed) for seed in seeds]
        outputs = self.engine.generate(requests, settings, use_tqdm=False)
        if self.config.sleep:
            self.engine.sleep(level=1)
            self._asleep = True
        return [_completion(output.outputs[0], params, row=row) for row, output in enumerate(outputs)]

    def _settings(self, params: SamplingParams, *, seed: int) -> Any:
        """vLLM's own SamplingParams, whose class the engine knows (kdlib.serving.engine alone imports vLLM)."""
        make = type(self.engine.get_default_sampling_params())
        return make(
            max_tokens=params.max_tokens,
            temperature=params.temperature,
            top_k=params.top_k,
            top_p=params.top_p,
            seed=seed,
            stop_token_ids=list(params.stop_ids),
            ignore_eos=True,  # only stop_ids end a completion
            logprobs=0 if params.log_probs else None,  # 0: the drawn token's alone
            detokenize=False,
        )

    def score(self, sequences: Sequence[list[int]]) -> list[list[float]]:
        """log q(x_t | x_<t) at temperature 1, S - 1 numbers for a sequence of S tokens."""
        self._wake()
        return own_log_probs(self._scorer, sequences)

    def load(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Replaces the weights, in the engine's dtype, and forgets what was cached for the old ones."""
        self._wake()
        self.engine.collective_rpc("reload_weights", kwargs={"weights_iterator": iter(weights)})
        if not self.engine.reset_prefix_cache():
            raise RuntimeError("the rollout engine keeps cached prefixes of the old weights: is another thread generating?")

    def close(self) -> None:
        """Ends the engine."""
        stop_engine(self.engine)

    def _wake(self) -> None:
        if self._asleep:
            self.engine.wake_up()
            self._asleep = False


def _completion(output: Any, params: SamplingParams, *, row: int) -> Completion:
    ids = list(output.token_ids)
    if not params.log_probs and ids:
        return Completion(ids=ids, logp=[math.nan] * len(ids), finish="stop" if ids[-1] in params.stop_ids else "length")
    logp = [entries[token].logprob for token, entries in zip(ids, output.logprobs, strict=True)]
    return completion(ids, logp, stop_ids=params.stop_ids, row=row)
