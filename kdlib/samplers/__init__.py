"""Rollout engines: token ids in, token ids out, from the student itself, from vLLM in this process, or from a server."""

from __future__ import annotations

from kdlib.lazy import exports

__all__ = [
    "HFSampler",
    "RolloutConfig",
    "ServerSampler",
    "StaleEngineError",
    "VLLMSampler",
    "merged_weights",
    "probe_sequences",
    "untie",
    "verify_sync",
]

__getattr__ = exports(
    __name__,
    {
        "HFSampler": "kdlib.samplers.hf",
        "RolloutConfig": "kdlib.samplers.config",
        "ServerSampler": "kdlib.samplers.server",
        "StaleEngineError": "kdlib.samplers.verify",
        "VLLMSampler": "kdlib.samplers.vllm",
        "merged_weights": "kdlib.samplers.weights",
        "probe_sequences": "kdlib.samplers.verify",
        "untie": "kdlib.samplers.weights",
        "verify_sync": "kdlib.samplers.verify",
    },
)
