"""What is known of a checkpoint layout: the transformers class that computes the same, its names and its settings."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedConfig

# What a config.json says of the file and the code it belongs to, not of the model.
_OF_THE_FILE = ("architectures", "auto_map", "model_type", "transformers_version", "dtype", "torch_dtype", "diffusion")


@dataclass(frozen=True, kw_only=True)
class Layout:
    """A published layout, one ``model_type`` of config.json, whose keys are those of the transformers configuration.

    model: the transformers class. renames: (published, transformers) beginnings of parameter names, {} for the number of a
    layer; others stay as they are. required: {key of config.json: (values with which the class computes the same, what an
    absent key stands for)}. tokenizers: {tokenizer class that is remote code: the transformers class that splits alike}.
    """

    model_type: str
    model: str
    config_class: type[PreTrainedConfig]
    renames: tuple[tuple[str, str], ...] = ()
    required: Mapping[str, tuple[tuple[Any, ...], Any]] = field(default_factory=dict)
    tokenizers: Mapping[str, str] = field(default_factory=dict)

    def check(self, published: Mapping[str, Any]) -> None:
        """Raises ValueError for a config.json whose model the transformers class does not compute."""
        for key, (values, absent) in self.required.items():
            if (found := published.get(key, absent)) not in values:
                raise ValueError(
                    f"no transformers class computes a {self.model_type} checkpoint with {key} {found!r}: "
                    "--trust_remote_code true runs its own code, once you have read that"
                )

    def config(self, published: Mapping[str, Any]) -> PreTrainedConfig:
        """The transformers configuration of a config.json."""
        return self.config_class(**{key: value for key, value in published.items() if key not in _OF_THE_FILE})

    def published(self, config: PreTrainedConfig, *, original: Mapping[str, Any]) -> dict[str, Any]:
        """``original``, the config.json, with the values that ``config`` has now."""
        now = {key: value for key, value in config.to_dict().items() if key not in _OF_THE_FILE}
        now["rope_theta"] = config.rope_parameters["rope_theta"]
        return {key: now.get(key, value) for key, value in original.items()}

    def key_mapping(self) -> dict[str, str]:
        """The renames as ``from_pretrained(key_mapping=)`` takes them: {regular expression: replacement}."""
        return {_pattern(published): ours.replace("{}", r"\1") for published, ours in self.renames}

    def published_name(self, name: str) -> str:
        """The checkpoint's own name of the transformers class's parameter ``name``."""
        for published, ours in self.renames:
            name, found = re.subn(_pattern(ours), published.replace("{}", r"\1"), name)
            if found:
                break
        return name


def _pattern(start: str) -> str:
    return "^" + re.escape(start).replace(r"\{\}", r"(\d+)")
