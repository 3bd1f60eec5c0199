"""The teacher that answers: its engine, its tokenizer, what ends its answers, and how long they may be."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any, Protocol

from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from kdlib.decoding.sampling import context_length
from kdlib.models import load_config, load_model, load_tokenizer
from kdlib.samplers.config import RolloutConfig
from kdlib.serving.client import Served, ServerClient, is_url
from kdlib.serving.command import serve_command
from kdlib.tokenizers.identity import tokenizer_fingerprint
from kdlib.trainers.turns import stop_ids
from kdlib.types import Sampler

DRAWN = ("engine", "temperature", "top_p", "top_k")  # what of the rollout options the completions depend on


class SourceArguments(Protocol):
    """The options of a command that say who writes, and how it is loaded."""

    model: str
    rollout: RolloutConfig
    tokenizer: str | None
    chat_template_kwargs: dict[str, Any] | None
    dtype: str
    attn_implementation: str | None
    load_in_8bit: bool
    load_in_4bit: bool
    trust_remote_code: bool
    device: str | None
    seed: int


@dataclass(frozen=True, kw_only=True)
class Source:
    """``checkpoint``: path or Hub id of the teacher's weights, ``context``: its longest row in tokens, None without a limit."""

    rollout: RolloutConfig
    checkpoint: str
    tokenizer: PreTrainedTokenizerBase
    stop_ids: tuple[int, ...]
    context: int | None

    @property
    def longest_prompt(self) -> int | None:
        """A prompt has to leave room for a token."""
        return None if self.context is None else self.context - 1

    @property
    def settings(self) -> dict[str, Any]:
        """What the completions depend on, by the names of the options."""
        return {
            "model": self.checkpoint,
            **{f"rollout.{name}": getattr(self.rollout, name) for name in DRAWN},
            "tokenizer": tokenizer_fingerprint(self.tokenizer),
            "stop_ids": list(self.stop_ids),
        }

    def sampler(self, a: SourceArguments, *, model: PreTrainedModel | None = None) -> Sampler:
        """The engine, started; ``model``: the weights that engine hf uses, where they are loaded already."""
        if self.rollout.engine == "vllm":
            from kdlib.samplers import VLLMSampler

            return VLLMSampler(self.checkpoint, self.rollout, dtype=a.dtype, seed=a.seed, trust_remote_code=a.trust_remote_code)
        if self.rollout.engine == "server":
            from kdlib.samplers import ServerSampler

            assert self.rollout.url is not None
            return ServerSampler(self.rollout.url, self.rollout)
        from kdlib.samplers import HFSampler

        assert isinstance(self.tokenizer.pad_token_id, int)
        return HFSampler(self.load(a) if model is None else model, pad_token_id=self.tokenizer.pad_token_id)

    def load(self, a: SourceArguments) -> PreTrainedModel:
        """The weights in this process, in evaluation mode."""
        import torch

        from kdlib.teachers.hf import quantization

        quantized = quantization(load_in_8bit=a.load_in_8bit, load_in_4bit=a.load_in_4bit)
        device = torch.device(a.device or ("cuda" if torch.cuda.is_available() else "cpu"))
        model = load_model(
            self.checkpoint,
            dtype=a.dtype,
            attn_implementation=a.attn_implementation,
            quantization_config=quantized,
            device_map=None if quantized is None else {"": device},
            trust_remote_code=a.trust_remote_code,
        )
        if quantized is None:
            model.to(device)
        return model.eval()


def source_of(a: SourceArguments, *, loaded: bool = False) -> Source:
    """The teacher that the options name; ValueError when it, or its tokenizer, is not there. Loads no weights.

    loaded: the model is loaded in this process too, whatever engine writes.
    """
    rollout = a.rollout
    if is_url(a.model):
        if rollout.url not in (None, a.model):
            raise ValueError(f"model {a.model} and rollout.url {rollout.url} are two servers: leave one out")
        rollout = replace(rollout, engine="server", url=a.model)
    if not loaded:
        _refuse_unused(a, rollout)
    served = _served(a, rollout) if rollout.engine == "server" else None
    checkpoint = a.model if served is None or rollout is a.rollout else served.root
    home = a.tokenizer or checkpoint
    try:
        tokenizer = load_tokenizer(home, trust_remote_code=a.trust_remote_code)
    except ValueError as error:
        if served is None or a.tokenizer:
            raise
        raise ValueError(f"the server's model is {home}, and here is no such tokenizer: add --tokenizer PATH") from error
    config = _config(checkpoint if served is None else home, a.trust_remote_code)
    return Source(
        rollout=rollout,
        checkpoint=checkpoint,
        tokenizer=tokenizer,
        stop_ids=_stop_ids(home if served else checkpoint, config, tokenizer, a.chat_template_kwargs or {}),
        context=_context(rollout, served, config),
    )


def _refuse_unused(a: SourceArguments, rollout: RolloutConfig) -> None:
    """ValueError for options that only a model in this process has."""
    given = {"attn_implementation": a.attn_implementation, "load_in_8bit": a.load_in_8bit, "load_in_4bit": a.load_in_4bit}
    used = [name for name, value in {**given, "device": a.device}.items() if value]
    if used and rollout.engine != "hf":
        raise ValueError(f"{', '.join(used)}: for rollout.engine hf, not {rollout.engine}; leave it out")


def _served(a: SourceArguments, rollout: RolloutConfig) -> Served:
    assert rollout.url is not None
    client = ServerClient(rollout.url, timeout=rollout.timeout, patience=rollout.patience)
    return client.models(command=serve_command(a.tokenizer or "MODEL", signal="generate"))[0]


def _config(name: str, trust_remote_code: bool) -> Any:
    """The model's configuration; None where only a tokenizer is."""
    try:
        return load_config(name, trust_remote_code=trust_remote_code)
    except (OSError, ValueError):
        return None


def _context(rollout: RolloutConfig, served: Served | None, config: Any) -> int | None:
    if served is not None:
        return served.max_model_len
    if rollout.engine == "vllm" and rollout.max_model_len is not None:
        return rollout.max_model_len
    length = float("inf") if config is None else context_length(SimpleNamespace(config=config))
    return None if length == float("inf") else int(length)


def _stop_ids(
    name: str, config: Any, tokenizer: PreTrainedTokenizerBase, template_kwargs: Mapping[str, Any]
) -> tuple[int, ...]:
    """The tokens after which an answer ends: those of the generation config, the tokenizer and the chat template."""
    try:
        given = GenerationConfig.from_pretrained(name).eos_token_id
    except OSError:
        given = None if config is None else config.get_text_config().eos_token_id
    return stop_ids(given, tokenizer, template_kwargs)
