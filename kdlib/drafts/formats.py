"""EAGLE-3 heads on disk: the EAGLE (SpecForge) and the speculators format, both as vLLM reads them; safetensors alone.

eagle: config.json of a Llama with ``architectures: [LlamaForCausalLMEagle3]``, the layer's tensors under ``midlayer.``.
speculators: ``speculators_model_type: eagle3`` with the target's name in it, the layer's tensors under ``layers.0.``.
"""

from __future__ import annotations

import json
import logging
import shlex
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from safetensors.torch import load_file, save
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import cached_file

from kdlib.drafts.eagle3 import Eagle3Draft
from kdlib.drafts.eagle3_config import Eagle3Config, check_feature_layers, default_feature_layers
from kdlib.drafts.vocabulary import DraftVocabulary
from kdlib.files import write_whole

logger = logging.getLogger("kdlib.drafts")

Format = Literal["eagle", "speculators"]
_CONFIG, _WEIGHTS, _INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
_EAGLE_LAYER, _LAYER, _EMBEDDINGS = "midlayer.", "layers.0.", "embed_tokens.weight"
_FLAGS = ("norm_before_residual", "norm_before_fc", "fc_norm", "norm_output")
_LAYER_IDS = "eagle_aux_hidden_state_layer_ids"
_VERSION = "0.3.0"  # of the speculators library whose files these are like
_SHAPE = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "hidden_act",
    "max_position_embeddings",
    "initializer_range",
    "rms_norm_eps",
    "vocab_size",
    "attention_bias",
    "mlp_bias",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
)


def write(
    draft: Eagle3Draft,
    directory: str | Path,
    *,
    format: Format = "eagle",
    target_name: str | None = None,
    target_architectures: tuple[str, ...] = (),
    num_speculative_tokens: int | None = None,
    dtype: torch.dtype | None = None,
) -> Path:
    """The head in ``format``, its weights as they are or in ``dtype``; the target's embeddings are left to the target.

    speculators names the target (a path or Hub id, and its ``architectures``) and the tokens to draft a round, so that
    ``vllm serve DIRECTORY`` alone works. ValueError without them, or without the layers that the features come from.
    """
    if format not in get_args(Format):
        raise ValueError(f"format {format!r}: choose eagle or speculators")
    if draft.config.feature_layers is None:
        raise ValueError("the head does not say which layers its features come from: set config.feature_layers")
    weights = {name: x.to(dtype or x.dtype) if x.is_floating_point() else x for name, x in draft.state_dict().items()}
    if not draft.config.own_embeddings:
        del weights[_EMBEDDINGS]
    content = _eagle_config(draft.config, weights["fc.weight"].dtype)
    if format == "eagle":
        weights = {name.replace(_LAYER, _EAGLE_LAYER): tensor for name, tensor in weights.items()}
    else:
        if not target_name or not num_speculative_tokens:
            raise ValueError("the speculators format holds target_name and num_speculative_tokens: give both")
        verifier = {"name_or_path": target_name, "architectures": list(target_architectures)}
        content = _speculators_config(draft.config, content, verifier=verifier, gamma=num_speculative_tokens)
    saved = save({name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}, {"format": "pt"})
    write_whole(Path(directory) / _WEIGHTS, saved)
    write_whole(Path(directory) / _CONFIG, json.dumps(content, indent=2) + "\n")
    return Path(directory)


def load(path: str | Path, target: PreTrainedModel | None = None) -> Eagle3Draft:
    """A head in either format from a directory or Hub id, in the dtype it was saved in and in evaluation mode.

    target: gives the embeddings, which most heads do not carry, and the layers where an old head names none. Raises ValueError
    for checkpoints without safetensors, of other methods or shapes, and where tensors, maps and configuration disagree.
    """
    settings = _settings(_read_config(str(path)), path)
    if settings["feature_layers"] is None and target is not None:
        settings["feature_layers"] = list(default_feature_layers(target.config.get_text_config().num_hidden_layers))
    weights = {name.replace(_EAGLE_LAYER, _LAYER): tensor for name, tensor in _read_weights(str(path)).items()}
    config = Eagle3Config(**settings, own_embeddings=_own_embeddings(weights, target))
    config.dtype = weights["fc.weight"].dtype if "fc.weight" in weights else torch.float32
    _check_maps(weights, config, path)
    draft = Eagle3Draft(config).to(config.dtype)
    if not config.own_embeddings:
        weights[_EMBEDDINGS] = draft.embed_tokens.weight.detach() if target is None else _embeddings(target).to(config.dtype)
    _load_state(draft, weights, path)
    if target is not None and config.feature_layers is not None:
        check_feature_layers(config.feature_layers, num_layers=target.config.get_text_config().num_hidden_layers)
    return draft.eval()


def serve_command(directory: str | Path, *, format: Format, target_name: str, num_speculative_tokens: int) -> str:
    """What to type to serve the target with this head."""
    if format == "speculators":
        return f"vllm serve {shlex.quote(str(directory))}"
    given = {"method": "eagle3", "model": str(directory), "num_speculative_tokens": num_speculative_tokens}
    return f"vllm serve {shlex.quote(target_name)} --speculative-config {shlex.quote(json.dumps(given))}"


def _eagle_config(config: Eagle3Config, dtype: torch.dtype) -> dict[str, Any]:
    """The Llama of one layer with what makes it an EAGLE-3 head; every flag is written, because readers' defaults differ."""
    rope = dict(config.rope_parameters)
    theta = rope.pop("rope_theta")
    return {
        "architectures": ["LlamaForCausalLMEagle3"],
        "model_type": "llama",
        **{name: getattr(config, name) for name in _SHAPE},
        "rope_theta": theta,
        "rope_scaling": None if rope.get("rope_type") == "default" else rope,
        "tie_word_embeddings": False,
        "draft_vocab_size": config.draft_vocab_size,
        "target_hidden_size": config.target_hidden_size,
        _LAYER_IDS: list(config.feature_layers or []),
        **{name: getattr(config, name) for name in _FLAGS},
        "dtype": str(dtype).removeprefix("torch."),
        "torch_dtype": str(dtype).removeprefix("torch."),
    }


def _speculators_config(config: Eagle3Config, eagle: dict[str, Any], *, verifier: dict[str, Any], gamma: int) -> dict[str, Any]:
    outside = ("draft_vocab_size", "target_hidden_size", _LAYER_IDS, *_FLAGS)
    proposal = {"proposal_type": "greedy", "speculative_tokens": gamma, "verifier_accept_k": 1, "accept_tolerance": 0.0}
    layer = {key: value for key, value in eagle.items() if key not in (*outside, "architectures")}
    return {
        "architectures": ["Eagle3Speculator"],
        "speculators_model_type": "eagle3",
        "speculators_version": _VERSION,
        **{key: eagle[key] for key in outside},
        "tie_word_embeddings": False,
        "transformer_layer_config": layer,
        "speculators_config": {
            "algorithm": "eagle3",
            "proposal_methods": [proposal],
            "default_proposal_method": "greedy",
            "verifier": verifier,
        },
        "dtype": eagle["dtype"],
        "torch_dtype": eagle["torch_dtype"],
    }


def _settings(content: dict[str, Any], path: str | Path) -> dict[str, Any]:
    """Eagle3Config's fields from either configuration."""
    if "speculators_model_type" in content:
        if content["speculators_model_type"] != "eagle3":
            raise ValueError(f"{path} is a speculators checkpoint of {content['speculators_model_type']}: eagle3 is supported")
        flat = {**content["transformer_layer_config"], **content}
        if "norm_before_residual" not in content:
            logger.warning("%s does not say norm_before_residual: taken as true, as vLLM does", path)
            flat["norm_before_residual"] = True
    elif content.get("architectures") == ["LlamaForCausalLMEagle3"]:
        flat = {**(content.get("eagle_config") or {}), **content}
    else:
        raise ValueError(f"{path} is no EAGLE-3 head: its architectures are {content.get('architectures')}")
    kind = content.get("transformer_layer_config", content).get("model_type", "llama")
    if kind != "llama":
        raise ValueError(f"{path} has a layer of type {kind}: heads with a llama layer are supported")
    rope = ("rope_theta", "rope_scaling", "rope_parameters")
    taken = {name: flat[name] for name in (*_SHAPE, *_FLAGS, *rope) if flat.get(name) is not None}
    sizes = {name: flat.get(name) for name in ("draft_vocab_size", "target_hidden_size")}
    return {**taken, **sizes, "feature_layers": flat.get(_LAYER_IDS) or None, "tie_word_embeddings": False}


def _own_embeddings(weights: dict[str, Tensor], target: PreTrainedModel | None) -> bool:
    """Whether the checkpoint's embeddings are other than the target's; copies of the target's are dropped."""
    own = weights.get(_EMBEDDINGS)
    if own is None or target is None:
        return own is not None
    given = _embeddings(target)
    same = given.shape == own.shape and torch.equal(given.cpu().to(own.dtype), own)
    if same:
        del weights[_EMBEDDINGS]
    return not same


def _embeddings(target: PreTrainedModel) -> Tensor:
    found: Tensor = target.get_input_embeddings().weight.detach()
    return found.cpu()


def _check_maps(weights: dict[str, Tensor], config: Eagle3Config, path: str | Path) -> None:
    """ValueError where d2t and t2d are missing or contradict the sizes or each other; a whole vocabulary needs neither."""
    DV, V = config.draft_vocab_size, config.vocab_size
    assert DV is not None
    if "d2t" not in weights:
        if DV != V:
            raise ValueError(f"{path} drafts {DV} of {V} tokens but has no d2t: its ids would mean other tokens")
        weights["d2t"] = torch.zeros(DV, dtype=torch.long)
    if len(weights["d2t"]) != DV:
        raise ValueError(f"{path}: d2t has {len(weights['d2t'])} entries, draft_vocab_size is {DV}")
    vocabulary = DraftVocabulary.of_maps(weights["d2t"], weights.get("t2d"), vocab_size=V)
    weights["d2t"], weights["t2d"] = vocabulary.d2t, vocabulary.t2d


def _load_state(draft: Eagle3Draft, weights: dict[str, Tensor], path: str | Path) -> None:
    expected = {name: tuple(x.shape) for name, x in draft.state_dict().items()}
    found = {name: tuple(x.shape) for name, x in weights.items()}
    wrong = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
    if wrong:
        said = ", ".join(f"{name} {found.get(name, 'missing')} for {expected.get(name, 'none')}" for name in wrong[:4])
        raise ValueError(f"{path}: {len(wrong)} tensors do not fit an EAGLE-3 head of this configuration: {said}")
    draft.load_state_dict(weights)


def _read_config(name: str) -> dict[str, Any]:
    path = cached_file(name, _CONFIG, _raise_exceptions_for_missing_entries=False)
    if path is None:
        raise ValueError(f"{name} holds no {_CONFIG}: give the directory of an EAGLE-3 head")
    return json.loads(Path(path).read_text())


def _read_weights(name: str) -> dict[str, Tensor]:
    """All tensors of the checkpoint; pickles are not opened."""
    index = cached_file(name, _INDEX, _raise_exceptions_for_missing_entries=False)
    files = {_WEIGHTS} if index is None else set(json.loads(Path(index).read_text())["weight_map"].values())
    found: dict[str, Tensor] = {}
    for file in sorted(files):
        path = cached_file(name, file, _raise_exceptions_for_missing_entries=False)
        if path is None:
            raise ValueError(
                f"{name} holds no {file}, and .bin or .pt files are pickles, which kdlib does not open: convert one you trust "
                "with safetensors.torch.save_file(torch.load('pytorch_model.bin', weights_only=True), 'model.safetensors')"
            )
        found |= load_file(path)
    return found


def is_head(path: str | Path) -> bool:
    """Whether a directory holds an EAGLE-3 head in one of the two formats."""
    config = Path(path) / _CONFIG
    if not config.is_file():
        return False
    content = json.loads(config.read_text())
    return content.get("speculators_model_type") == "eagle3" or content.get("architectures") == ["LlamaForCausalLMEagle3"]
