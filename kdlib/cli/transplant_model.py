"""A model that changes its tokenizer: embeddings, head, special tokens, chat template and configuration."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jinja2 import TemplateError
from tokenizers import AddedToken
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kdlib.data.draft import BadRowError
from kdlib.head import Head
from kdlib.keys import draw_key
from kdlib.models import check_causal, eos_ids, fit_vocabulary
from kdlib.tokenizers.initial import Method, Plan
from kdlib.tokenizers.pieces import unknown_ids
from kdlib.tokenizers.transplant import ROLES, transplant_plan
from kdlib.trainers.turns import end_of_turn

_TURNS = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hello"}]
# what chat templates show their special tokens in; those that refuse a conversation are asked for the next
_CONVERSATIONS: list[list[dict[str, str]]] = [
    [*_TURNS, {"role": "user", "content": "Hello"}],
    [{"role": "system", "content": "Hello"}, *_TURNS],
    [*_TURNS, {"role": "tool", "content": "Hello"}],
]


@dataclass(frozen=True, kw_only=True)
class Transplanted:
    """The tokenizer that the model has now (``new`` with the special tokens that were added), and how its rows were made."""

    tokenizer: PreTrainedTokenizerBase
    plan: Plan
    notes: tuple[str, ...] = ()


@torch.no_grad()
def transplant(
    model: PreTrainedModel,
    *,
    old: PreTrainedTokenizerBase,
    new: PreTrainedTokenizerBase,
    method: Method = "fvt",
    seed: int = 0,
    untie: bool = False,
    pad_to_multiple_of: int | None = None,
) -> Transplanted:
    """Gives ``model``, in place, the tokenizer ``new`` instead of ``old``: rows by ``transplant_plan``, biases alike.

    The chat template of ``new`` stays; without one it gets that of ``old``, with the special tokens that this needs. ``untie``
    gives a head that was the embeddings weights of its own. ``new`` itself is not changed. Raises ValueError for models without
    embeddings or with quantised ones, that read both ways, or that have further tables over the vocabulary.
    """
    _check(model)
    tokenizer, notes = speaking(old, new)
    ends = _end(old), _end(tokenizer)
    turns = {ends[1]: ends[0]} if ends[0] is not None and ends[1] is not None else {}
    plan = transplant_plan(old, tokenizer, method=method, roles=turns)
    if untie:
        _untie(model)
    _replace_rows(model, plan, seed=seed)
    size, multiple = len(plan.copied), pad_to_multiple_of or 1
    fit_vocabulary(model, -(-size // multiple) * multiple, tokens=size)
    _set_ids(model, tokenizer, plan)
    return Transplanted(tokenizer=tokenizer, plan=plan, notes=notes)


def speaking(old: PreTrainedTokenizerBase, new: PreTrainedTokenizerBase) -> tuple[PreTrainedTokenizerBase, tuple[str, ...]]:
    """A copy of ``new`` that has an end of text and a chat template where ``old`` has them; notes for the user.

    The special tokens of the old template that ``new`` has in the same role are written as its own, the others are added to it.
    """
    made = copy.deepcopy(new)
    template = old.chat_template if made.chat_template is None else None
    needed = [] if template is None else list(_shown(old, template))
    if made.eos_token is None and old.eos_token is not None:
        needed.append(AddedToken(old.eos_token, special=True, normalized=False))
    changed: dict[str, str] = {}
    for token in needed:
        _provide(made, token, role=_role(old, token.content), changed=changed)
    if template is None:
        return made, ()
    made.chat_template = (
        _replaced(template, changed)
        if isinstance(template, str)
        else {name: _replaced(text, changed) for name, text in template.items()}
    )
    return made, tuple(_doubts(old, made, changed))


def _doubts(old: PreTrainedTokenizerBase, made: PreTrainedTokenizerBase, changed: Mapping[str, str]) -> Iterator[str]:
    """Lines for a chat template that does not read as it did."""
    texts = list(_rendered(made))
    if texts != [_replaced(text, changed) for text in _rendered(old)]:
        yield "the chat template reads differently with the new tokenizer's special tokens: check it"
    if unknown_ids(made).intersection(made.encode(texts[0], add_special_tokens=False)):
        yield "the new tokenizer does not know all of the chat template's text: what is unknown to it is lost"


def _shown(old: PreTrainedTokenizerBase, template: str | Mapping[str, str]) -> Iterator[AddedToken]:
    """The added tokens that a template writes, in its text or on a conversation; no mere white space."""
    texts = "\n".join([*([template] if isinstance(template, str) else template.values()), *_rendered(old)])
    return (token for token in old.added_tokens_decoder.values() if token.content.strip() and token.content in texts)


def _rendered(tokenizer: PreTrainedTokenizerBase) -> Iterator[str]:
    for messages in _CONVERSATIONS:
        try:
            yield str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
        except (TemplateError, TypeError, ValueError):
            yield ""


def _role(old: PreTrainedTokenizerBase, content: str) -> str | None:
    return next((role for role in ROLES if getattr(old, role) == content), None)


def _provide(made: PreTrainedTokenizerBase, token: AddedToken, *, role: str | None, changed: dict[str, str]) -> None:
    """Makes ``token`` one of ``made``, or of ``changed``, {content: that of the new token of its role}."""
    if any(token.content == known.content for known in made.added_tokens_decoder.values()):
        return
    if role is not None and getattr(made, role) is not None:
        changed[token.content] = getattr(made, role)
        return
    # without the stripping of white space around it that some have: bytes would be lost
    added = AddedToken(token.content, special=token.special, normalized=False)
    if role is None:
        made.add_tokens([added], special_tokens=token.special)
    else:
        made.add_special_tokens({role: added})


def _replaced(text: str, changed: Mapping[str, str]) -> str:
    if not changed:
        return text
    longest_first = sorted(changed, key=len, reverse=True)
    return re.sub("|".join(map(re.escape, longest_first)), lambda match: changed[match[0]], text)


def _end(tokenizer: PreTrainedTokenizerBase) -> int | None:
    try:
        found = end_of_turn(tokenizer, {})
    except BadRowError:  # a template that wants more than two plain turns
        return None
    return None if found in unknown_ids(tokenizer) else found  # text that the tokenizer does not know, behind the turn


def _check(model: PreTrainedModel) -> None:
    check_causal(model, role="model")
    Head.of(model)  # a ValueError for what is no plain matrix
    if "vocab_size_per_layer_input" in model.config.get_text_config().to_dict():
        raise ValueError(
            f"{type(model).__name__} has embeddings in every layer, of another vocabulary: it cannot be transplanted"
        )


def _untie(model: PreTrainedModel) -> None:
    for config in (model.config, model.config.get_text_config()):
        config.tie_word_embeddings = False
    head = model.get_output_embeddings()
    if head.weight is model.get_input_embeddings().weight:
        head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=head.weight.requires_grad)


def _replace_rows(model: PreTrainedModel, plan: Plan, *, seed: int) -> None:
    """Rows of the input embeddings, of the head where it has its own, and of its bias."""
    matrices: list[Any] = [model.get_input_embeddings().weight]
    head = model.get_output_embeddings()
    if head.weight is not matrices[0]:
        matrices.append(head.weight)
    rows = [plan.rows(matrix, seed=draw_key(seed, i)) for i, matrix in enumerate(matrices)]
    bias = None if head.bias is None else plan.rows(head.bias[:, None], seed=draw_key(seed, 2))[:, 0]
    model.resize_token_embeddings(len(plan.copied), mean_resizing=False)
    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
    for weight, made in zip((embeddings.weight, head.weight), rows, strict=False):
        weight.copy_(made)
    if bias is not None:
        head.bias.copy_(bias)


def _set_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, plan: Plan) -> None:
    """The ids of special tokens in the configuration and in what generation reads."""
    moved = {int(plan.copied[token]): token for token in (plan.copied >= 0).nonzero()[:, 0].tolist()}
    text = model.config.get_text_config()
    configs = [config for config in (model.config, text, model.generation_config) if config is not None]
    for config in {id(config): config for config in configs}.values():
        for name, given in config.to_dict().items():
            if name.endswith("_token_id"):
                setattr(config, name, _new_id(given, _of_role(tokenizer, name), moved))
    model.get_input_embeddings().padding_idx = text.pad_token_id


def _of_role(tokenizer: PreTrainedTokenizerBase, name: str) -> int | None:
    """The new tokenizer's own; a padding token that is the end of text is none."""
    role = name.removesuffix("_id")
    if role not in ROLES or (role == "pad_token" and tokenizer.pad_token_id == tokenizer.eos_token_id):
        return None
    found: int | None = getattr(tokenizer, name)
    return found


def _new_id(given: int | Sequence[int] | None, own: int | None, moved: Mapping[int, int]) -> int | list[int] | None:
    """The new id or ids of a token, its own first; those that have no counterpart are left out."""
    others = [moved[token] for token in eos_ids(given) if token in moved]
    ids = list(dict.fromkeys(([] if own is None else [own]) + others))
    if isinstance(given, int) or given is None:
        return ids[0] if ids else None
    return ids or None
