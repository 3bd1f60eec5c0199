"""The models that lm-eval knows beside its own; importing this module registers them under their names."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from peft import PeftConfig, PeftModel
from torch import Tensor

from kdlib.decoding.prompts import stops_of
from kdlib.eval.diffusion_config import is_adapter
from kdlib.eval.jacobi_decoder import JacobiDecoder
from kdlib.layouts import read_config, tokenizer_class
from kdlib.models import load_model, load_tokenizer

SAMPLING = ("do_sample", "temperature", "top_p", "top_k", "min_p", "typical_p")  # of no effect on greedy decoding


@register_model("kdlib")
class DistilledLM(HFLM):
    """lm-eval's ``hf`` model, which also takes an adapter directory and finds its base model and tokenizer.

    Every other argument is HFLM's own. Checkpoints of ``kdlib.layouts`` become transformers classes. The adapter
    goes onto the base model as it is, whose vocabulary is not resized to the tokenizer's: an adapter on a padded
    lm_head would no longer fit.
    """

    def __init__(self, pretrained: Any, *, tokenizer: Any = None, **hflm_arguments: Any) -> None:
        self.adapter = pretrained if is_adapter(pretrained) else None
        if self.adapter is not None:
            pretrained = PeftConfig.from_pretrained(self.adapter).base_model_name_or_path
            if tokenizer is None and Path(self.adapter, "tokenizer_config.json").is_file():
                tokenizer = self.adapter
        super().__init__(pretrained, tokenizer=tokenizer, **hflm_arguments)

    def _get_config(self, pretrained: str, *, revision: str, **arguments: Any) -> None:
        self._config = read_config(pretrained, revision=revision)
        if self._config is None:
            super()._get_config(pretrained, revision=revision, **arguments)

    def _create_tokenizer(self, pretrained: Any, tokenizer: Any, *, revision: str, **arguments: Any) -> None:
        name = pretrained if tokenizer is None else tokenizer
        if isinstance(name, str) and tokenizer_class(name) is not None:
            tokenizer = load_tokenizer(name)
        super()._create_tokenizer(pretrained, tokenizer, revision=revision, **arguments)

    def _create_model(self, pretrained: str, *, revision: str, dtype: Any, **arguments: Any) -> None:
        self._model: Any
        if read_config(pretrained, revision=revision) is None:
            super()._create_model(pretrained, revision=revision, dtype=dtype, **arguments)
        else:
            self._model = load_model(pretrained, revision=revision, dtype=dtype, device_map={"": self.device})
        if self.adapter is not None:
            self._model = PeftModel.from_pretrained(self._model, self.adapter)


@register_model("kdlib-jacobi")
class JacobiLM(DistilledLM):
    """lm-eval's ``hf`` model whose ``generate_until`` decodes blocks of tokens in parallel; likelihoods are unchanged.

    The answers are those of greedy decoding. ``block_size`` (capped at a task's max_gen_toks) to ``seed`` are the options of
    ``kdlib.eval.jacobi_decoder.JacobiDecoder``, every other argument is HFLM's own. A row ends at the model's eos and at a stop
    string that is one token; what follows a longer stop string is cut from the answer as HFLM does, yet it was decoded and is
    counted. The results' ``config`` has the ``decoder``: its options, ``new_tokens``, ``passes`` and ``tokens_per_forward``,
    the ratio of (new tokens - 1) and passes, prompts' passes left out; None when nothing was generated.

    Raises ValueError when a task samples, or asks for something else that greedy decoding does not have.
    """

    def __init__(self, pretrained: Any, **arguments: Any) -> None:
        ours = {field.name for field in fields(JacobiDecoder)}
        self.decoder = JacobiDecoder(**{name: value for name, value in arguments.items() if name in ours})
        self.new_tokens = self.gained = self.passes = 0
        super().__init__(pretrained, **{name: value for name, value in arguments.items() if name not in ours})

    def _model_generate(
        self, context: Tensor, max_length: int, stop: list[str], *, attention_mask: Tensor, **generation: Any
    ) -> Tensor:
        _check_greedy(generation)
        room = max_length - context.shape[1]
        decoder = replace(self.decoder, block_size=min(self.decoder.block_size, room))
        # HFLM's own precision
        precision = {"dtype": self.mixed_precision_dtype, "enabled": self.mixed_precision_dtype is not None}
        with torch.autocast(self.device.type, **precision):
            output = decoder.run(
                self.model,
                context,
                attention_mask=attention_mask,
                max_new_tokens=room,
                stop_ids=self._stop_ids(stop),
                pad_token_id=self.tokenizer.pad_token_id,
            )
        self.new_tokens += int(output.lengths.sum())
        self.gained += int((output.lengths - 1).sum())
        self.passes += int(output.passes.sum())
        return output.sequences

    def _stop_ids(self, stop: list[str]) -> list[int]:
        """The model's eos and the stop strings that are one token."""
        return list(dict.fromkeys([*stops_of(self.model, None), *single_tokens(self.tokenizer, stop)]))

    def get_model_info(self) -> dict[str, Any]:
        counted = {"new_tokens": self.new_tokens, "passes": self.passes}
        ratio = self.gained / self.passes if self.passes else None
        return super().get_model_info() | {"decoder": {**self.decoder.to_json(), **counted, "tokens_per_forward": ratio}}


def single_tokens(tokenizer: Any, texts: Iterable[str]) -> list[int]:
    """The ids of those texts that are one token."""
    found = [tokenizer.encode(text, add_special_tokens=False) for text in texts]
    return [ids[0] for ids in found if len(ids) == 1]


def _check_greedy(generation: Mapping[str, Any]) -> None:
    if generation.get("do_sample") or generation.get("temperature", 0) > 0:
        raise ValueError("the Jacobi decoder is greedy: leave do_sample and temperature out of the task's gen_kwargs")
    if more := sorted(set(generation) - set(SAMPLING)):
        raise ValueError(f"the Jacobi decoder is plain greedy decoding: it has no {', '.join(more)}, drop it from gen_kwargs")
