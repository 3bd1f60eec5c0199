"""Rows of a dataset -> token rows: ``input_ids``, ``labels`` (unshifted, -100 = not scored) and a content-
derived ``sample_id``.

A row's kind is decided by its columns: ``input_ids``, ``messages``, ``prompt`` + ``completion``, ``text``, or a
``prompt`` for the student to answer. Beside them ``teacher`` names the teacher of the row, and
``teacher_prompt`` is what that teacher reads in place of the prompt.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeVar

import xxhash
from datasets import Dataset, Features, List, Value

from kdlib.data.chat import ChatFormat
from kdlib.data.draft import UNSCORED, BadRowError, Draft, TokenRow, sample_id
from kdlib.data.kinds import draft_row, row_kind
from kdlib.data.packing import pack_rows
from kdlib.tokenizers.identity import Tool, template_fingerprint, tool_schemas

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

T = TypeVar("T")
_Texts = dict[bool, dict[str, list[int]]]

_VERSION = 2  # raise it when the same row would become other tokens: prepared rows on disk are found by it
_FEATURES = Features(
    {
        "input_ids": List(Value("int32")),
        "labels": List(Value("int32")),
        "sample_id": Value("int64"),
        "reason": Value("string"),  # why the row was skipped, empty when it was not
        "truncated": Value("bool"),
    }
)
_TEACHER = Features({"teacher": Value("string")})
_TEACHER_PROMPT = Features({"teacher_prompt_ids": List(Value("int32"))})


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """Token rows and what happened on the way.

    ``dataset``: columns ``input_ids``, ``labels``, ``sample_id``, and ``seq_lengths`` when packed; ``teacher`` and
    ``teacher_prompt_ids`` where the rows had ``teacher`` and ``teacher_prompt``.
    ``skipped``: rows dropped, by ``reasons``. ``truncated``: source rows cut at max_length, or conversations
    whose later turns did not fit.
    """

    dataset: Dataset
    skipped: int
    reasons: dict[str, int]
    truncated: int


def prepare_dataset(
    rows: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    tools: Sequence[Tool] | None = None,
    packing: bool = False,
    skip_bad_rows: bool = False,
    prompts_only: bool = False,
    num_proc: int | None = None,
    keep_source: bool = False,
) -> Prepared:
    """Tokenise and label ``rows``; one longer than ``max_length`` tokens is cut and not taught to end there.

    Rows may bring their own ``tools`` and ``chat_template_kwargs``. Raises ValueError for columns of no known
    kind and for a row that teaches nothing, which ``skip_bad_rows`` drops and counts instead.
    prompts_only: rows may end before the answer (``prompt`` alone, ``messages`` that end with another's turn);
    they become the rendered prompt with its generation prompt, and nothing in them is scored.
    keep_source: a column ``source``, which of ``rows`` each came from.
    """
    if max_length < 2:
        raise ValueError(f"max_length={max_length}: a row needs 2 tokens, one to predict and one before it")
    if len(rows) == 0:
        raise ValueError("the dataset is empty: nothing to train on")
    chat = ChatFormat(tokenizer=tokenizer, template_kwargs=chat_template_kwargs or {}, tools=tool_schemas(tools))
    kind = row_kind(rows, tokenizer=tokenizer, prompts_only=prompts_only)
    settings: dict[str, Any] = {
        "kind": kind,
        "max_length": max_length,
        "skip_bad_rows": skip_bad_rows,
        "prompts_only": prompts_only,
    }
    features = _features(rows.column_names)
    if keep_source:
        features["source"] = Value("int64")
    if packing and "teacher_prompt_ids" in features:
        raise ValueError("packing puts several rows into one, which a teacher_prompt cannot stand before: leave packing out")
    tokenised = rows.map(
        _Preparer(chat=chat, columns=tuple(features), **settings),
        batched=True,
        with_indices=True,
        remove_columns=rows.column_names,
        features=features,
        num_proc=num_proc,
        desc="Tokenizing",
        new_fingerprint=_fingerprint(rows, chat, **settings, **({"source": True} if keep_source else {})),
    )
    return _counted(tokenised, packing=packing, max_length=max_length)


def _features(columns: Sequence[str]) -> Features:
    """Those of every prepared row, and those of the optional columns that the rows have."""
    features = dict(_FEATURES)
    if "teacher" in columns:
        features |= _TEACHER
    if "teacher_prompt" in columns or "teacher_prompt_ids" in columns:
        features |= _TEACHER_PROMPT
    return Features(features)


def _counted(tokenised: Dataset, *, packing: bool, max_length: int) -> Prepared:
    """Drop what was skipped, count it, and pack if asked."""
    outcomes = tokenised["reason"][:]
    reasons = Counter(reason for reason in outcomes if reason)
    truncated = sum(tokenised["truncated"][:])
    dataset = tokenised.remove_columns(["reason", "truncated"])
    if reasons:
        dataset = dataset.select([i for i, reason in enumerate(outcomes) if not reason])
    if len(dataset) == 0:
        raise ValueError(f"every row was skipped ({', '.join(f'{n} x {reason}' for reason, n in reasons.items())})")
    if packing:
        dataset = pack_rows(dataset, max_length=max_length)
    return Prepared(dataset=dataset, skipped=reasons.total(), reasons=dict(reasons), truncated=truncated)


@dataclass(frozen=True, kw_only=True)
class _Preparer:
    """A batch of rows -> ``columns`` of token rows, all of the batch's texts tokenised in one call."""

    kind: str
    chat: ChatFormat
    columns: tuple[str, ...]
    max_length: int
    skip_bad_rows: bool
    prompts_only: bool

    def __call__(self, batch: Mapping[str, list[Any]], indices: list[int]) -> dict[str, list[Any]]:
        rows = [dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)]
        arguments = (self.kind, self.chat, self.prompts_only)
        drafts = [self._tried(i, draft_row, row, *arguments) for i, row in zip(indices, rows, strict=True)]
        encoded = self._encoded([draft for draft in drafts if isinstance(draft, Draft)])
        columns: dict[str, list[Any]] = {name: [] for name in self.columns}
        for index, row, draft in zip(indices, rows, drafts, strict=True):
            made = self._tried(index, self._token_rows, draft, encoded) if isinstance(draft, Draft) else draft
            for values in _skipped(made) if isinstance(made, BadRowError) else _kept(*made):
                values |= {"teacher": row.get("teacher"), "source": index}
                for name in columns:
                    columns[name].append(values[name])
        return columns

    def _tried(self, index: int, step: Callable[..., T], *arguments: Any) -> T | BadRowError:
        """The step's result, or the BadRowError it raised when such rows are skipped."""
        try:
            return step(*arguments)
        except BadRowError as problem:
            if self.skip_bad_rows:
                return problem
            raise ValueError(f"row {index}: {problem}, or drop such rows with --skip_bad_rows true") from problem

    def _encoded(self, drafts: Sequence[Draft]) -> _Texts:
        """Token ids by whether the tokenizer added its special tokens, and by text."""
        encoded: _Texts = {}
        for special in (False, True):
            texts = list({text: None for draft in drafts if draft.special == special for text in draft.texts})
            if texts:
                ids = self.chat.tokenizer(texts, add_special_tokens=special, verbose=False)["input_ids"]
                encoded[special] = dict(zip(texts, ids, strict=True))
        return encoded

    def _token_rows(self, draft: Draft, encoded: _Texts) -> tuple[list[TokenRow], bool]:
        """The draft's rows cut to max_length and still scoring something, and whether anything was lost."""
        whole = draft.build(encoded.get(draft.special, {}))
        answered = any(_scores(row) for row in whole)
        if not answered and not self.prompts_only:
            raise BadRowError("no scored token", fix="give it an answer (or set on_policy_fraction 1)")
        if not answered:
            kept = [row for row in whole if len(row.input_ids) < self.max_length]
        else:
            kept = [row for row in map(self._cut, whole) if _scores(row)]
        if not kept:
            raise BadRowError(
                f"the prompt alone reaches max_length={self.max_length}",
                fix="raise max_length or shorten the prompt",
            )
        return kept, len(kept) < len(whole) or any(len(row.input_ids) > self.max_length for row in whole)

    def _cut(self, row: TokenRow) -> TokenRow:
        return replace(row, input_ids=row.input_ids[: self.max_length], labels=row.labels[: self.max_length])


def _scores(row: TokenRow) -> bool:
    return any(label != UNSCORED for label in row.labels)


def _kept(rows: Sequence[TokenRow], truncated: bool) -> list[dict[str, Any]]:
    """Values of the columns per token row; a cut is counted once per source row."""
    return [
        {
            "input_ids": row.input_ids,
            "labels": row.labels,
            "sample_id": sample_id(row.input_ids, row.labels, row.teacher_prompt_ids),
            "reason": "",
            "truncated": truncated and index == 0,
            "teacher_prompt_ids": row.teacher_prompt_ids,
        }
        for index, row in enumerate(rows)
    ]


def _skipped(problem: BadRowError) -> list[dict[str, Any]]:
    empty = {"input_ids": [], "labels": [], "sample_id": 0, "teacher_prompt_ids": None}
    return [{**empty, "reason": problem.reason, "truncated": False}]


def _fingerprint(rows: Dataset, chat: ChatFormat, **settings: Any) -> str:
    """Names prepared rows by all they depend on, so that the next run and other processes reuse them."""
    tokenizer = chat.tokenizer
    content = tokenizer.backend_tokenizer.to_str() if tokenizer.is_fast else repr(tokenizer.get_vocab())
    template = template_fingerprint(tokenizer, chat_template_kwargs=chat.template_kwargs, tools=chat.tools)
    parts = (
        _VERSION,
        rows._fingerprint,
        content,
        tokenizer.special_tokens_map,
        template,
        sorted(settings.items()),
    )
    return xxhash.xxh64_hexdigest(repr(parts).encode())
