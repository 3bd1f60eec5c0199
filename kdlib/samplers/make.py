"""The engine that a configuration asks for."""

from __future__ import annotations

from torch import nn

from kdlib.samplers.config import RolloutConfig
from kdlib.samplers.hf import HFSampler
from kdlib.samplers.server import ServerSampler
from kdlib.samplers.vllm import VLLMSampler
from kdlib.types import Sampler


def make_sampler(
    config: RolloutConfig, *, model: nn.Module, checkpoint: str, pad_token_id: int, dtype: str = "auto", seed: int = 0
) -> Sampler:
    """A Sampler for the student ``model``, whose architecture an engine loads from ``checkpoint`` (a directory or Hub id).

    ``dtype``: of an engine in this process, auto, float32 or bfloat16. The engine has the checkpoint's weights, or whatever its
    server has, until ``load`` is called.
    """
    if config.engine == "hf":
        return HFSampler(model, pad_token_id=pad_token_id, batch_size=config.batch_size)
    if config.engine == "vllm":
        return VLLMSampler(checkpoint, config, dtype=dtype, seed=seed)
    assert config.url is not None
    return ServerSampler(config.url, config)
