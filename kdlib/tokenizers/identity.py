"""Which tokenizer, which chat template: content hashes for caches, and whether two models speak the same
tokens.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import xxhash

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Tool = dict[str, Any] | Callable[..., Any]


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """xxhash64 of the vocabulary, the merges (or unigram scores) and the added tokens; 16 hex digits.

    Equal after saving and loading, and for every fast tokenizer of the same content. The chat template is not
    part of it (``template_fingerprint``), nor are special-token roles or the embedding rows a model pads its
    vocabulary with.
    """
    return _digest(
        [
            sorted(tokenizer.get_vocab().items()),
            _merges(tokenizer),
            sorted(tokenizer.get_added_vocab().items()),
        ]
    )


def template_fingerprint(
    tokenizer: PreTrainedTokenizerBase,
    *,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    tools: Sequence[Tool] | None = None,
) -> str:
    """xxhash64 of the chat template and of what is passed to it; 16 hex digits."""
    return _digest([tokenizer.chat_template, dict(chat_template_kwargs or {}), tool_schemas(tools)])


def tool_schemas(tools: Sequence[Tool] | None) -> list[dict[str, Any]] | None:
    """Tools as JSON schemas: functions are described by their signature and docstring."""
    from transformers.utils.chat_template_utils import get_json_schema

    return [tool if isinstance(tool, dict) else get_json_schema(tool) for tool in tools] if tools else None


def same_tokenizer(a: PreTrainedTokenizerBase, b: PreTrainedTokenizerBase) -> bool:
    """Whether every token, added ones included, has the same id in both, so that one's ids mean the same to
    the other.
    """
    return a.get_vocab() == b.get_vocab()


def explain_difference(a: PreTrainedTokenizerBase, b: PreTrainedTokenizerBase) -> str:
    """One line: the first id at which two tokenizers differ, and their sizes."""
    first, second = (dict(zip(v.values(), v.keys(), strict=True)) for v in (a.get_vocab(), b.get_vocab()))
    sizes = f"sizes {len(first)} and {len(second)}"
    for index in sorted(first.keys() | second.keys()):
        if first.get(index) != second.get(index):
            ours, theirs = (repr(side[index]) if index in side else "nothing" for side in (first, second))
            return f"id {index} is {ours} in one and {theirs} in the other ({sizes})"
    return f"the tokenizers have the same tokens ({sizes})"


def _merges(tokenizer: PreTrainedTokenizerBase) -> Any:
    """What beside the vocabulary decides how text splits: BPE merges, unigram scores, or nothing (a Python
    tokenizer).
    """
    if not tokenizer.is_fast:
        return None
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    return model["vocab"] if model["type"] == "Unigram" else model.get("merges")


def _digest(content: Any) -> str:
    return xxhash.xxh64_hexdigest(json.dumps(content, sort_keys=True, ensure_ascii=True).encode())
