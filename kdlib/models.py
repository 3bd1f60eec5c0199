"""transformers and peft models as kdlib uses them: loading, the backbone without its head, and the check that both fit."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from kdlib import layouts
from kdlib.head import Head
from kdlib.streams import Streams, attention_mask

MODEL_INPUTS = ("input_ids", "attention_mask", "position_ids")


def load_model(
    name: str,
    *,
    dtype: str | torch.dtype | None = "auto",
    attn_implementation: str | None = None,
    quantization_config: Any = None,
    device_map: Any = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """A language model from a path or Hub id; ValueError with one line when there is none.

    Checkpoints of ``kdlib.layouts`` (LLaDA, Dream, ...) become transformers classes, also where remote code is trusted: that
    is for the others.
    """
    options = {"dtype": dtype, "revision": revision, "device_map": device_map}
    optional = {"attn_implementation": attn_implementation, "quantization_config": quantization_config}
    options |= {key: value for key, value in optional.items() if value is not None}
    try:
        config = _mapped_config(name, revision=revision, trust_remote_code=trust_remote_code)
        if config is not None:
            return layouts.load(name, config, **options)
        return AutoModelForCausalLM.from_pretrained(name, trust_remote_code=trust_remote_code, **options)
    except (OSError, ValueError) as error:
        raise ValueError(not_loadable("model", name, error)) from error


def load_config(name: str, *, revision: str | None = None, trust_remote_code: bool = False) -> PreTrainedConfig:
    """The configuration of the model that ``load_model`` makes of a path or Hub id; OSError or ValueError without one."""
    config = _mapped_config(name, revision=revision, trust_remote_code=trust_remote_code)
    return config or AutoConfig.from_pretrained(name, revision=revision, trust_remote_code=trust_remote_code)


def _mapped_config(name: str, *, revision: str | None, trust_remote_code: bool) -> PreTrainedConfig | None:
    """``layouts.read_config``; None also for a variant that is left to its own code, which is trusted."""
    try:
        return layouts.read_config(name, revision=revision)
    except ValueError:
        if trust_remote_code:
            return None
        raise


def load_tokenizer(name: str, *, revision: str | None = None, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer of a path or Hub id, with a padding token (its eos when it has none)."""
    try:
        stock = layouts.tokenizer_class(name, revision=revision)
        if stock is not None:
            tokenizer = stock.from_pretrained(name, revision=revision)
        else:
            tokenizer = AutoTokenizer.from_pretrained(name, revision=revision, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise ValueError(not_loadable("tokenizer", name, error)) from error
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def not_loadable(what: str, name: str, error: Exception) -> str:
    """The line for a ``what`` that is not at ``name``: a path that is not there, or what loading it said."""
    looks_local = name.startswith((".", "/", "~")) or name.count("/") > 1
    if looks_local and not Path(name).exists():
        return f"no {what} at {name}: the directory does not exist"
    return f"cannot load a {what} from {name!r}: {str(error).strip().splitlines()[0]}"


def inner(model: nn.Module) -> PreTrainedModel:
    """The transformers model inside a peft one (whose layers carry the adapters), or the model itself."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def hidden_states(
    model: nn.Module, batch: Mapping[str, Any], *, layers: tuple[int, ...] = ()
) -> tuple[Tensor, dict[int, Tensor]]:
    """Last hidden states [B, S, D] after the final norm, and the asked layers' {layer: [B, S, D]} (0 = embeddings).

    A batch with ``stream`` and ``clean_until`` [B, S] is read as several streams of tokens (``kdlib.streams``), ordered by
    ``order`` [B, S] where that is given, else by ``position_ids``.
    """
    inputs = {key: batch[key] for key in MODEL_INPUTS if key in batch}
    if "stream" in batch:
        position = batch.get("order", batch["position_ids"])
        streams = Streams(position=position, stream=batch["stream"], clean_until=batch["clean_until"])
        inputs["attention_mask"] = attention_mask(inner(model).config, queries=streams, keys=streams)
    output = inner(model).get_decoder()(**inputs, use_cache=False, output_hidden_states=bool(layers))
    return output.last_hidden_state, {layer: output.hidden_states[layer] for layer in layers}


@contextmanager
def evaluating(*models: nn.Module) -> Iterator[None]:
    """Every module of ``models`` in eval mode, without dropout and gradient checkpointing; each one's own flag is restored."""
    flags = [(module, module.training) for model in models for module in model.modules()]
    for model in models:
        model.eval()
    try:
        yield
    finally:
        for module, training in flags:
            module.training = training


def check_causal(model: nn.Module, *, role: str) -> None:
    """Raises ValueError for a model whose tokens see later ones, which would be asked for the next token by looking at it."""
    if not getattr(inner(model).config, "is_causal", True):  # few configurations have the entry
        raise ValueError(f"the {role} reads both ways, as a diffusion model does: use kdlib diffusion and evaluate diffusion")


@torch.no_grad()
def check_head(model: nn.Module, *, role: str) -> None:
    """Raises ValueError unless head(backbone(x)) equals model(x).logits on four tokens.

    A scale or cap of the logits that ``Head`` does not know would otherwise train on wrong numbers without a word.
    """
    base = inner(model)
    device, training = next(base.parameters()).device, base.training
    if device.type == "meta":
        return
    base.eval()
    ids = torch.arange(4, device=device)[None]
    hidden, _ = hidden_states(model, {"input_ids": ids})
    ours, theirs = Head.of(base)(hidden[0]).float(), base(input_ids=ids, use_cache=False).logits[0].float()
    base.train(training)
    tolerance = 1e-3 if theirs.dtype == hidden.dtype == torch.float32 else 5e-2
    if (ours - theirs).abs().max() > tolerance * theirs.abs().max().clamp(min=1.0):
        raise ValueError(
            f"the {role} ({type(base).__name__}) does more to its logits than kdlib.head.Head knows: please report the model"
        )


@torch.no_grad()
def check_streams(model: nn.Module, *, role: str) -> None:
    """Raises ValueError unless two tokens after the start of a text read the same beside the text as alone.

    Models that place tokens by their columns, as ALiBi does, would otherwise train on wrong numbers without a word.
    """
    device = next(model.parameters()).device
    if device.type == "meta":
        return
    columns = {"input_ids": [0, 1, 2, 3, 3, 2], "position_ids": [0, 1, 2, 3, 2, 3]}
    columns |= {"stream": [0, 0, 0, 0, 1, 1], "clean_until": [0, 0, 0, 0, 2, 2]}
    batch = {name: torch.tensor([values], device=device) for name, values in columns.items()}
    with evaluating(model):
        beside = hidden_states(model, batch)[0][0, 4:]
        alone = hidden_states(model, {"input_ids": torch.tensor([[0, 1, 3, 2]], device=device)})[0][0, 2:]
    tolerance = 1e-3 if alone.dtype == torch.float32 else 5e-2
    if (beside - alone).abs().max() > tolerance * alone.abs().max().clamp(min=1.0):
        raise ValueError(
            f"the {role} ({type(inner(model)).__name__}) does not place tokens by position_ids and mask alone, so it cannot "
            "read several streams in one pass: use a model with rotary or learned positions and plain attention layers"
        )


@torch.no_grad()
def fit_vocabulary(model: PreTrainedModel, vocab_size: int, *, tokens: int) -> int:
    """Gives ``model`` embeddings and head of ``vocab_size`` entries in place; how many were added (or, below 0, cut).

    An added entry is the mean of the first ``tokens`` rows. In a head it gives the mean of their logits, which is never above
    the highest (zeros give 0, which may win), and by Jensen's inequality a probability of at most 1 / tokens. Entries are cut
    from the end.
    """
    entries = model.get_input_embeddings().weight.shape[0]
    if entries == vocab_size:
        return 0
    model.resize_token_embeddings(vocab_size, mean_resizing=False)
    head = model.get_output_embeddings()
    biases = [] if head is None or head.bias is None else [head.bias]
    for rows in (model.get_input_embeddings().weight, head.weight, *biases):
        rows[entries:] = rows[: min(tokens, entries)].float().mean(0)
    return vocab_size - entries


def eos_ids(eos: int | Sequence[int] | None) -> tuple[int, ...]:
    """The tokens that end a text, of the ``eos_token_id`` of a configuration or generation config: none, one or several."""
    return () if eos is None else (eos,) if isinstance(eos, int) else tuple(eos)


def parameter_count(model: nn.Module, *, trainable: bool = False) -> int:
    """Number of (trainable) parameters; quantised ones count as they are stored."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad or not trainable)
