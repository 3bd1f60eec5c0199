"""Rows of a dataset -> token rows: ``input_ids``, ``labels`` (unshifted, -100 = not scored) and a content-
derived ``sample_id``.

A row's kind is decided by its columns: ``input_ids``, ``messages``, ``prompt`` + ``completion``, or ``text``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
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

_VERSION = 1  # raise it when the same row would become other tokens: prepared rows on disk are found by it
_FEATURES = Features(
    {
        "input_ids": List(Value("int32")),
        "labels": List(Value("int32")),
        "sample_id": Value("int64"),
        "reason": Value("string"),  # why the row was skipped, empty when it was not
        "truncated": Value("bool"),
    }
)


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """Token rows and what happened on the way.

    ``dataset``: columns ``input_ids``, ``labels``, ``sample_id``, and ``seq_lengths`` when packed.
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
    num_proc: int | None = None,
) -> Prepared:
    """Tokenise and label ``rows``; one longer than ``max_length`` tokens is cut and not taught to end there.

    Rows may bring their own ``tools`` and ``chat_template_kwargs``. Raises ValueError for columns of no known
    kind and for a row that teaches nothing, which ``skip_bad_rows`` drops and counts instead.
    """
    if max_length < 2:
        raise ValueError(f"max_length={max_length}: a row needs 2 tokens, one to predict and one before it")
    if len(rows) == 0:
        raise ValueError("the dataset is empty: nothing to train on")
    chat = ChatFormat(tokenizer=tokenizer, template_kwargs=chat_template_kwargs or {}, tools=tool_schemas(tools))
    kind = row_kind(rows, tokenizer=tokenizer)
    tokenised = rows.map(
        _Preparer(kind=kind, chat=chat, max_length=max_length, skip_bad_rows=skip_bad_rows),
        batched=True,
        with_indices=True,
        remove_columns=rows.column_names,
        features=_FEATURES,
        num_proc=num_proc,
        desc="Tokenizing",
        new_fingerprint=_fingerprint(rows, chat, kind=kind, max_length=max_length, skip_bad_rows=skip_bad_rows),
    )
    return _counted(tokenised, packing=packing, max_length=max_length)


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
    """A batch of rows -> columns of ``_FEATURES``, all of the batch's texts tokenised in one call."""

    kind: str
    chat: ChatFormat
    max_length: int
    skip_bad_rows: bool

    def __call__(self, batch: Mapping[str, list[Any]], indices: list[int]) -> dict[str, list[Any]]:
        rows = [dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)]
        drafts = [self._tried(i, draft_row, row, self.kind, self.chat) for i, row in zip(indices, rows, strict=True)]
        encoded = self._encoded([draft for draft in drafts if isinstance(draft, Draft)])
        columns: dict[str, list[Any]] = {name: [] for name in _FEATURES}
        for index, draft in zip(indices, drafts, strict=True):
            made = self._tried(index, self._token_rows, draft, encoded) if isinstance(draft, Draft) else draft
            for values in _skipped(made) if isinstance(made, BadRowError) else _kept(*made):
                for name, value in zip(columns, values, strict=True):
                    columns[name].append(value)
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
        if not any(_scores(row) for row in whole):
            raise BadRowError("no scored token", fix="give it an answer")
        cut = [TokenRow(input_ids=row.input_ids[: self.max_length], labels=row.labels[: self.max_length]) for row in whole]
        kept = [row for row in cut if _scores(row)]
        if not kept:
            raise BadRowError(
                f"the prompt alone reaches max_length={self.max_length}",
                fix="raise max_length or shorten the prompt",
            )
        return kept, len(kept) < len(whole) or any(len(row.input_ids) > self.max_length for row in whole)


def _scores(row: TokenRow) -> bool:
    return any(label != UNSCORED for label in row.labels)


def _kept(rows: Sequence[TokenRow], truncated: bool) -> list[tuple[Any, ...]]:
    """Values of ``_FEATURES`` per token row; a cut is counted once per source row."""
    return [
        (row.input_ids, row.labels, sample_id(row.input_ids, row.labels), "", truncated and index == 0)
        for index, row in enumerate(rows)
    ]


def _skipped(problem: BadRowError) -> list[tuple[Any, ...]]:
    return [([], [], 0, problem.reason, False)]


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
