"""The configuration of EAGLE-3 draft heads, and which hidden states of the target they read."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from transformers import LlamaConfig, PretrainedConfig

FEATURES = 3  # hidden states that are fused: low, middle, high

_SHAPE = (
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "hidden_act",
    "max_position_embeddings",
    "initializer_range",
    "rms_norm_eps",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
)


class Eagle3Config(LlamaConfig):
    """The decoder layer's configuration as Llama's, ``vocab_size`` V of the target, and:

    draft_vocab_size: DV, V by default. target_hidden_size: Dt, ``hidden_size`` by default.
    feature_layers: three rising ids i; feature i is the residual stream BEFORE the target's layer i, which is
        ``output.hidden_states[i]`` of transformers, vLLM's ``eagle_aux_hidden_state_layer_ids``, 0 the embeddings.
    norm_before_residual: add the normed input (True) or the input as it is (False) to the attention's output.
    norm_before_fc, fc_norm: one norm over the three features together, one over each, before they are fused.
    norm_output: the hidden state after the final norm is fed back, not the one before it (EAGLE-3.1).
    own_embeddings: the token embeddings are the draft's own, and saved with it, instead of the target's.
    Raises ValueError for layer ids that are not distinct and rising: vLLM sorts them and takes each once.
    """

    model_type = "kdlib_eagle3"

    draft_vocab_size: int | None = None
    target_hidden_size: int | None = None
    feature_layers: list[int] | None = None
    norm_before_residual: bool = False
    norm_before_fc: bool = False
    fc_norm: bool = False
    norm_output: bool = False
    own_embeddings: bool = False
    num_hidden_layers: int = 1

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        self.draft_vocab_size = self.draft_vocab_size or self.vocab_size
        self.target_hidden_size = self.target_hidden_size or self.hidden_size
        if self.feature_layers is not None:
            check_feature_layers(self.feature_layers)
        if self.num_hidden_layers != 1 or self.attention_bias or self.mlp_bias:
            raise ValueError("an EAGLE-3 head here is one decoder layer without biases")

    @staticmethod
    def of_target(
        target: PretrainedConfig,
        *,
        draft_vocab_size: int | None = None,
        feature_layers: Sequence[int] | None = None,
        **changes: Any,
    ) -> Eagle3Config:
        """A head shaped like one layer of the target; ``changes`` go to the configuration, for example intermediate_size."""
        text = target.get_text_config().to_dict()
        layers = tuple(feature_layers or default_feature_layers(text["num_hidden_layers"]))
        check_feature_layers(layers, num_layers=text["num_hidden_layers"])
        rope = text.get("rope_parameters") or {}
        taken = {name: text[name] for name in _SHAPE if text.get(name) is not None}
        taken |= {"rope_parameters": rope} if "rope_type" in rope else {}  # others keep one for each kind of layer
        return Eagle3Config(
            **{
                **taken,
                "vocab_size": text["vocab_size"],
                "draft_vocab_size": draft_vocab_size,
                "target_hidden_size": text["hidden_size"],
                "feature_layers": list(layers),
                "tie_word_embeddings": False,
                **changes,
            }
        )


def default_feature_layers(num_layers: int) -> tuple[int, int, int]:
    """EAGLE's (2, L/2, L-3); where a small L makes these collapse, (1, L/2 rounded up, L-1), and (0, 1, 2) for L = 3.

    ValueError below three layers, which have no three hidden states before the last norm.
    """
    published = (2, num_layers // 2, num_layers - 3)
    if published[0] < published[1] < published[2]:
        return published
    if num_layers < FEATURES:
        raise ValueError(f"a target of {num_layers} layers has no three distinct hidden states for an EAGLE-3 head")
    return (1, (num_layers + 1) // 2, num_layers - 1) if num_layers > FEATURES else (0, 1, 2)


def check_feature_layers(layers: Sequence[int], *, num_layers: int | None = None) -> None:
    """ValueError unless these are three distinct ids in rising order, of layers the target has."""
    rising = len(layers) == FEATURES and layers[0] >= 0 and all(a < b for a, b in pairwise(layers))
    if not rising or (num_layers is not None and layers[-1] >= num_layers):
        below = "" if num_layers is None else f" below {num_layers}"
        raise ValueError(f"feature_layers are {FEATURES} distinct rising layer ids{below}, not {tuple(layers)}")
