"""The kinds of rows, told by their columns, and how each becomes a draft of token rows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from datasets import Dataset

from kdlib.data.chat import ChatFormat, conversation_draft
from kdlib.data.draft import UNSCORED, BadRowError, Draft, Encoded, TokenRow, common_prefix, first_scored, scored_row
from kdlib.data.messages import chat_messages, parsed_json, without_nulls
from kdlib.tokenizers.identity import tokenizer_fingerprint, tool_schemas

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_KINDS = {  # the first whose columns are all there
    "tokens": {"input_ids"},
    "messages": {"messages"},
    "pair": {"prompt", "completion"},
    "text": {"text"},
    "prompt": {"prompt"},
}


def row_kind(rows: Dataset, *, tokenizer: PreTrainedTokenizerBase, prompts_only: bool = False) -> str:
    """Which kind of rows a dataset holds, or a ValueError that names its columns; a ``prompt`` alone with ``prompts_only``."""
    columns = set(rows.column_names)
    if "seq_lengths" in columns:
        raise ValueError("the dataset is packed already (seq_lengths): give it unpacked, with packing")
    for kind, needed in _KINDS.items():
        if needed <= columns and (prompts_only or kind != "prompt"):
            if "teacher_prompt" in columns and kind in ("tokens", "text"):
                raise ValueError(
                    "teacher_prompt takes the place of a prompt: give rows with `messages`, or `prompt` and "
                    "`completion` (rows of token ids take `teacher_prompt_ids`)"
                )
            if kind == "tokens" and "tokenizer" in columns and rows[0]["tokenizer"] != tokenizer_fingerprint(tokenizer):
                raise ValueError(
                    "the rows' token ids were written with another tokenizer: select the column `messages` "
                    "(docs/generate.md shows how)"
                )
            chatty = kind == "messages" or (kind in ("pair", "prompt") and not isinstance(rows[0]["prompt"], str))
            if chatty and tokenizer.chat_template is None:
                raise ValueError(
                    "the tokenizer has no chat template for these messages: set tokenizer.chat_template, or "
                    "give `text` or `prompt` and `completion` as strings"
                )
            return kind
    raise ValueError(
        f"the dataset has the columns {', '.join(sorted(columns))}: rename them to `messages`, "
        "`prompt` and `completion`, `text`, or `input_ids` (with `labels` or `completion_mask`)"
        + (" (or set on_policy_fraction 1, which needs `prompt` alone)" if "prompt" in columns else "")
    )


def draft_row(row: Mapping[str, Any], kind: str, chat: ChatFormat, prompts_only: bool) -> Draft:
    """One row of the given kind, ready to be tokenised with its batch; one without its answer with ``prompts_only``."""
    if kind == "tokens":
        return _tokens_draft(row)
    if kind == "text":
        return _text_draft(row["text"], chat.tokenizer)
    chat = _own_format(row, chat)
    prompt, answered = _prompt(row, kind, prompts_only)
    if not answered:
        draft = _prompt_draft(prompt, chat)
    elif kind == "messages":
        draft = conversation_draft(chat_messages(row["messages"]), chat=chat)
    else:
        draft = _pair_draft(prompt, row["completion"], chat)
    seen = row.get("teacher_prompt")
    return draft if seen is None else _privileged(draft, prompt, seen, chat)


def _prompt(row: Mapping[str, Any], kind: str, prompts_only: bool) -> tuple[Any, bool]:
    """What comes before the first assistant turn that is scored, and whether the row goes on after it."""
    if kind == "prompt":
        return row["prompt"], False
    if kind == "pair":
        return row["prompt"], row["completion"] is not None or not prompts_only
    messages = chat_messages(row["messages"])
    if prompts_only and messages and messages[-1]["role"] != "assistant":
        return messages, False
    first = next((i for i, message in enumerate(messages) if message["role"] == "assistant"), len(messages))
    return messages[:first], True


def _own_format(row: Mapping[str, Any], chat: ChatFormat) -> ChatFormat:
    """The format with the row's own ``tools`` (instead of) and ``chat_template_kwargs`` (on top of the common
    ones).
    """
    tools, template_kwargs = (_value(row.get(name), what=name) for name in ("tools", "chat_template_kwargs"))
    return ChatFormat(
        tokenizer=chat.tokenizer,
        template_kwargs={**chat.template_kwargs, **template_kwargs} if template_kwargs else chat.template_kwargs,
        tools=tool_schemas(tools) if tools else chat.tools,
    )


def _value(cell: Any, *, what: str) -> Any:
    """A nested value of a row; tables that cannot hold it hold its JSON text."""
    return without_nulls(parsed_json(cell, what=what) if isinstance(cell, str) else cell)


def _text_draft(text: str | None, tokenizer: PreTrainedTokenizerBase) -> Draft:
    """All of a text is scored."""
    if not text:
        raise BadRowError("an empty text", fix="fill it in")

    def build(encoded: Encoded) -> list[TokenRow]:
        ids = _ended(encoded[text], tokenizer)
        return [scored_row(ids, [(0, len(ids))])]

    return Draft(texts=(text,), special=_wants_special(text, tokenizer), build=build)


def _pair_draft(prompt: Any, completion: Any, chat: ChatFormat) -> Draft:
    """``completion`` scored after ``prompt``; beside messages a string is the raw text after the generation
    prompt.
    """
    if isinstance(prompt, str) and isinstance(completion, str):
        return _continuation(prompt, completion, chat.tokenizer, _wants_special(prompt, chat.tokenizer))
    if isinstance(prompt, str):
        raise BadRowError("a completion that is not text", fix="give a string, or give prompt as a list of messages too")
    messages = chat_messages(prompt)
    if isinstance(completion, str):
        return _continuation(chat.render(messages, generation_prompt=True), completion, chat.tokenizer, False)
    return conversation_draft([*messages, *chat_messages(completion)], chat=chat, context=len(messages))


def _prompt_draft(prompt: Any, chat: ChatFormat) -> Draft:
    """A prompt with nothing behind it: nothing is scored, the student is to answer."""
    text, special = _prompt_text(prompt, chat)
    if not text:
        raise BadRowError("an empty prompt", fix="fill it in")

    def build(encoded: Encoded) -> list[TokenRow]:
        return [scored_row(_open(encoded[text], text, chat.tokenizer), [])]

    return Draft(texts=(text,), special=special, build=build)


def _prompt_text(prompt: Any, chat: ChatFormat) -> tuple[str, bool]:
    """A prompt as the model is served it, and whether the tokenizer is to add its special tokens."""
    if isinstance(prompt, str):
        return prompt, _wants_special(prompt, chat.tokenizer)
    return chat.render(chat_messages(prompt), generation_prompt=True), False


def _privileged(draft: Draft, prompt: Any, seen: Any, chat: ChatFormat) -> Draft:
    """The draft whose row has ``teacher_prompt_ids``: what the teacher reads where the student reads ``prompt``."""
    if isinstance(prompt, str) != isinstance(seen, str):
        raise BadRowError("a teacher_prompt that is not like the prompt", fix="give both as text or both as messages")
    (own, _), (text, special) = _prompt_text(prompt, chat), _prompt_text(seen, chat)
    if special != draft.special:
        raise BadRowError(
            "only one of prompt and teacher_prompt brings its beginning of text", fix="give both or neither with it"
        )

    def build(encoded: Encoded) -> list[TokenRow]:
        rows = draft.build(encoded)
        if len(rows) > 1:
            raise BadRowError("teacher_prompt in a conversation that becomes several rows", fix="give each answer its own row")
        before = rows[0].input_ids[: first_scored(rows[0].labels)]
        if before != _open(encoded[own], own, chat.tokenizer):
            raise BadRowError(
                "teacher_prompt cannot take the place of a prompt that ends within a token",
                fix="let the prompt end before the space, or where its chat template ends it",
            )
        ids = _open(encoded[text], text, chat.tokenizer)
        if not ids:
            raise BadRowError("an empty teacher_prompt", fix="fill it in")
        return [replace(rows[0], teacher_prompt_ids=ids)]

    return Draft(texts=(*draft.texts, own, text), special=special, build=build)


def _open(ids: list[int], text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """``ids`` without an end of text that the tokenizer put behind a prompt."""
    eos = tokenizer.eos_token
    added = eos is not None and ids[-1:] == [tokenizer.eos_token_id] and not text.rstrip().endswith(eos)
    return ids[:-1] if added else ids


def _continuation(prompt: str, completion: str, tokenizer: PreTrainedTokenizerBase, special: bool) -> Draft:
    if not completion:
        raise BadRowError("an empty completion", fix="fill it in")
    whole = prompt + completion

    def build(encoded: Encoded) -> list[TokenRow]:
        ids = _ended(encoded[whole], tokenizer)
        return [scored_row(ids, [(common_prefix(encoded[prompt], ids), len(ids))])]  # a straddling token is scored

    return Draft(texts=(prompt, whole), special=special, build=build)


def _ended(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """``ids`` with the tokenizer's end of text behind them, if it has one and they lack it."""
    eos = tokenizer.eos_token_id
    return ids if eos is None or ids[-1:] == [eos] else [*ids, eos]


def _wants_special(text: str, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the tokenizer should add its special tokens: not to a rendered text that brings its own
    beginning.
    """
    return not (tokenizer.bos_token and text.startswith(tokenizer.bos_token))


def _tokens_draft(row: Mapping[str, Any]) -> Draft:
    """Tokens as they are; scored where ``labels`` or ``completion_mask`` say so, else everywhere."""
    ids = row["input_ids"]
    if not ids:
        raise BadRowError("no input_ids", fix="fill them in")
    marks = _marks(row, ids)
    spans = [(i, i + 1) for i, mark in enumerate(marks) if mark]
    made = replace(scored_row(ids, spans), teacher_prompt_ids=row.get("teacher_prompt_ids"))
    return Draft(texts=(), special=False, build=partial(_built, made))


def _built(row: TokenRow, _: Encoded) -> list[TokenRow]:
    return [row]


def _marks(row: Mapping[str, Any], ids: list[int]) -> list[bool]:
    labels, mask = row.get("labels"), row.get("completion_mask")
    given = labels if labels is not None else mask
    if given is None:
        return [True] * len(ids)
    if len(given) != len(ids):
        raise BadRowError("labels or completion_mask of another length than input_ids", fix="give one per token")
    if labels is None:
        return [bool(mark) for mark in given]
    if any(label not in (UNSCORED, token) for label, token in zip(labels, ids, strict=True)):
        raise BadRowError("labels that are neither -100 nor the token's own id", fix="give them unshifted")
    return [label != UNSCORED for label in labels]
