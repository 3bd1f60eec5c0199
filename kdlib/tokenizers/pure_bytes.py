"""A tokenizer whose tokens are bytes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

from kdlib.tokenizers.pieces import gpt2_alphabet
from kdlib.tokenizers.transplant import ROLES

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast


def byte_tokenizer(like: PreTrainedTokenizerBase) -> PreTrainedTokenizerFast:
    """Token b is byte b, for b from 0 to 255; behind them the special tokens that have a role in ``like``, by that role.

    Every text decodes to itself. A text gets the special tokens around it that ``like`` gives it. Without a chat template.
    """
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE(vocab=gpt2_alphabet(), merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    roles = {role: getattr(like, role) for role in ROLES}
    special = {
        role: AddedToken(content, special=True, normalized=False) for role, content in roles.items() if content is not None
    }
    tokenizer.add_special_tokens(list(special.values()))
    ids = {content: tokenizer.token_to_id(content) for content in roles.values() if content is not None}
    before, behind = _around(like)
    if ids.keys() >= {*before, *behind}:
        template = [*before, "$A", *behind]
        tokenizer.post_processor = processors.TemplateProcessing(single=template, special_tokens=list(ids.items()))
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=like.model_max_length,
        clean_up_tokenization_spaces=False,
        **special,
    )


def _around(tokenizer: PreTrainedTokenizerBase) -> tuple[list[str], list[str]]:
    """The special tokens that a tokenizer puts before and behind a text."""
    whole, text = (tokenizer.encode("a", add_special_tokens=special) for special in (True, False))
    start = next(i for i in range(len(whole)) if whole[i : i + len(text)] == text)
    before, behind = (tokenizer.convert_ids_to_tokens(ids) for ids in (whole[:start], whole[start + len(text) :]))
    return list(before), list(behind)
