"""Rows of a dataset -> the prompts a teacher answers: rendered, tokenised, each once."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import xxhash
from datasets import Dataset
from numpy.typing import NDArray

from kdlib.data.chat import ChatFormat
from kdlib.data.draft import BadRowError, Draft, sample_id
from kdlib.data.kinds import draft_row
from kdlib.data.messages import Message, chat_messages
from kdlib.tokenizers.identity import Tool, tool_schemas

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Asked = str | list[Message]  # a raw text, or the messages before the answer
COLUMNS = ("prompt", "messages", "question", "turns")  # the first that a dataset has


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """What is asked: ``prompt_id`` is the hash of the token ``ids``, ``row`` the dataset's row with everything in it."""

    prompt_id: int
    ids: list[int]
    asked: Asked
    row: Mapping[str, Any]


@dataclass(kw_only=True)
class Prompts:
    """The distinct usable prompts of ``rows``, in their order.

    ``skipped``: rows without a usable prompt, by reason; ``duplicates``: rows whose prompt an earlier row has;
    ``fingerprint``: of the prompts' tokens and of everything else in their rows, which a verifier may read.
    """

    rows: Dataset
    chat_wrapped: bool  # strings are put into a user turn
    prompt_ids: list[int] = field(default_factory=list)
    skipped: Counter[str] = field(default_factory=Counter)
    duplicates: int = 0
    _ids: list[NDArray[np.int32]] = field(default_factory=list)
    _index: list[int] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.prompt_ids)

    def __getitem__(self, number: int) -> Prompt:
        row = self.rows[self._index[number]]
        ids = self._ids[number].tolist()
        return Prompt(prompt_id=self.prompt_ids[number], ids=ids, asked=asked(row, wrap=self.chat_wrapped), row=row)

    @property
    def row_numbers(self) -> list[int]:
        """Which row of ``rows`` each prompt is: the same problem has the same number for every tokenizer."""
        return list(self._index)

    @property
    def fingerprint(self) -> str:
        return self._digest.hexdigest()

    def add(self, index: int, row: Mapping[str, Any], *, ids: Sequence[int], longest: int | None) -> None:
        """The tokens of a row's prompt, unless it is empty, too long, or there already."""
        prompt_id = sample_id(ids, [])
        if not ids:
            self.skipped["the prompt renders to nothing"] += 1
        elif longest is not None and len(ids) > longest:
            self.skipped[f"the prompt is longer than {longest} tokens"] += 1
        elif prompt_id in self._seen:
            self.duplicates += 1
        else:
            self._seen.add(prompt_id)
            self.prompt_ids.append(prompt_id)
            self._ids.append(np.asarray(ids, dtype=np.int32))
            self._index.append(index)
            self._digest.update(self._ids[-1].tobytes())
            self._digest.update(json.dumps(row, sort_keys=True, default=str).encode())

    def __post_init__(self) -> None:
        self._seen: set[int] = set()
        self._digest = xxhash.xxh3_128()


def read_prompts(
    rows: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    *,
    longest: int | None = None,
    apply_chat_template: bool | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    tools: Sequence[Tool] | None = None,
) -> Prompts:
    """The prompts of ``rows``, each that of its ``COLUMNS`` (``asked``).

    longest: more tokens than this are skipped. apply_chat_template: put texts into a user turn; None does so where the
    tokenizer has a template. Rows may bring their own ``tools`` and ``chat_template_kwargs``. Raises ValueError for other
    columns, for messages without a template, and when no row has a usable prompt.
    """
    wrap = tokenizer.chat_template is not None if apply_chat_template is None else apply_chat_template
    _check_template(rows, tokenizer, wrap=wrap)
    chat = ChatFormat(tokenizer=tokenizer, template_kwargs=chat_template_kwargs or {}, tools=tool_schemas(tools))
    prompts, first = Prompts(rows=rows, chat_wrapped=wrap), 0
    for columns in rows.iter(batch_size=1000):
        batch = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
        for offset, made in enumerate(_tokenised([_drafted(row, chat, wrap=wrap) for row in batch], chat)):
            if isinstance(made, BadRowError):
                prompts.skipped[made.reason] += 1
            else:
                prompts.add(first + offset, batch[offset], ids=made, longest=longest)
        first += len(batch)
    if not len(prompts):
        reasons = ", ".join(f"{n} x {reason}" for reason, n in prompts.skipped.items())
        raise ValueError(f"no row has a usable prompt ({reasons}): fix the rows, or the limit they break")
    return prompts


def prompt_column(rows: Dataset, *, name: str = "the dataset") -> str:
    """The column that prompts are read from; ValueError, which calls the rows ``name``, when there is none."""
    column = next((column for column in COLUMNS if column in rows.column_names), None)
    if column is None:
        raise ValueError(
            f"{name} has the columns {', '.join(sorted(rows.column_names))}: rename one to `prompt`, `messages` or `question`"
        )
    return column


def asked(row: Mapping[str, Any], *, wrap: bool = False) -> Asked:
    """The row's prompt before it is rendered; BadRowError when it has none.

    It is ``prompt`` (text or messages), ``messages`` up to the last answer, ``question``, or the first of a conversation's
    ``turns``. wrap: a text becomes a user turn.
    """
    name = next(name for name in COLUMNS if name in row)
    value = _value(row, name)
    if value is None or not value or (isinstance(value, str) and not value.strip()):
        raise BadRowError("an empty prompt", fix="fill it in")
    if isinstance(value, str):
        return [{"role": "user", "content": value}] if wrap else value
    messages = chat_messages(value)
    before = messages[:-1] if name == "messages" and messages[-1]["role"] == "assistant" else messages
    if not before:
        raise BadRowError("a conversation that starts with its answer", fix="put a user turn before it")
    return before


def _value(row: Mapping[str, Any], column: str) -> Any:
    value = row[column]
    return value[0] if column == "turns" and isinstance(value, list) and value else value


def _check_template(rows: Dataset, tokenizer: PreTrainedTokenizerBase, *, wrap: bool) -> None:
    column = prompt_column(rows)
    if tokenizer.chat_template is None and (wrap or not isinstance(_value(rows[0], column), str)):
        raise ValueError(
            "the tokenizer has no chat template: give a model that has one, or prompts as text with --apply_chat_template false"
        )


def _drafted(row: Mapping[str, Any], chat: ChatFormat, *, wrap: bool) -> Draft | BadRowError:
    own = {name: row[name] for name in ("tools", "chat_template_kwargs") if name in row}
    try:
        return draft_row({"prompt": asked(row, wrap=wrap), **own}, "prompt", chat, True)
    except BadRowError as problem:
        return problem


def _tokenised(drafts: Sequence[Draft | BadRowError], chat: ChatFormat) -> list[list[int] | BadRowError]:
    """The prompts' token ids, all texts of a kind tokenised in one call."""
    encoded: dict[bool, dict[str, list[int]]] = {}
    for special in (False, True):
        texts = list({text: None for d in drafts if isinstance(d, Draft) and d.special == special for text in d.texts})
        if texts:
            ids = chat.tokenizer(texts, add_special_tokens=special, verbose=False)["input_ids"]
            encoded[special] = dict(zip(texts, ids, strict=True))
    return [d if isinstance(d, BadRowError) else d.build(encoded.get(d.special, {}))[0].input_ids for d in drafts]
