"""The models that lm-eval knows beside its own; importing this module registers them under their names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from peft import PeftConfig, PeftModel


@register_model("kdlib")
class DistilledLM(HFLM):
    """lm-eval's ``hf`` model, which also takes an adapter directory and finds its base model and tokenizer.

    Every other argument is HFLM's own. The adapter goes onto the base model as it is, whose vocabulary is not
    resized to the tokenizer's: an adapter on a padded lm_head would no longer fit.
    """

    def __init__(self, pretrained: Any, *, tokenizer: Any = None, **hflm_arguments: Any) -> None:
        self.adapter = pretrained if _is_adapter(pretrained) else None
        if self.adapter is not None:
            pretrained = PeftConfig.from_pretrained(self.adapter).base_model_name_or_path
            if tokenizer is None and Path(self.adapter, "tokenizer_config.json").is_file():
                tokenizer = self.adapter
        super().__init__(pretrained, tokenizer=tokenizer, **hflm_arguments)

    def _create_model(self, pretrained: str, **arguments: Any) -> None:
        super()._create_model(pretrained, **arguments)
        self._model: Any
        if self.adapter is not None:
            self._model = PeftModel.from_pretrained(self._model, self.adapter)


def _is_adapter(model: Any) -> bool:
    """Whether ``model`` is a directory that holds a peft adapter and no whole model."""
    if not isinstance(model, str):
        return False
    return Path(model, "adapter_config.json").is_file() and not Path(model, "config.json").is_file()
