"""Hidden states that vLLM writes itself."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from kdlib.drafts.eagle3_config import check_feature_layers


def vllm_extraction(layers: Sequence[int], *, num_layers: int, storage: str | Path) -> dict[str, Any]:
    """Options of ``vllm.LLM`` (or, as JSON, of ``vllm serve``) that make it write hidden states of prompts under ``storage``.

    Each request's ``kv_transfer_params["hidden_states_path"]`` then names a safetensors file with ``token_ids`` [n] and
    ``hidden_states`` [n, 4, Dt], the last of which is the residual stream BEFORE the final norm: apply the target's norm before
    its head. ValueError without CUDA, which this method of vLLM needs. Not run yet.
    """
    check_feature_layers(layers, num_layers=num_layers)
    if not torch.cuda.is_available():
        raise ValueError("vLLM's extract_hidden_states needs CUDA: use write_features with the target in transformers")
    ids = {"eagle_aux_hidden_state_layer_ids": [*layers, num_layers]}
    return {
        "speculative_config": {
            "method": "extract_hidden_states",
            "num_speculative_tokens": 1,
            "draft_model_config": {"hf_config": ids},
        },
        "kv_transfer_config": {
            "kv_connector": "ExampleHiddenStatesConnector",
            "kv_role": "kv_producer",
            "kv_connector_extra_config": {"shared_storage_path": str(storage)},
        },
    }
