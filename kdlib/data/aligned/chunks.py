"""Token rows of one text in two tokenisations: which tokens of them spell the same bytes."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import product

import numpy as np
from numpy.typing import NDArray

from kdlib.data.aligned.reader import Reader
from kdlib.data.draft import UNSCORED, common_prefix
from kdlib.tokenizers.alignment import chunk_ids, chunks, end_to_end

Ids = NDArray[np.int64]
_SPACE = b" \t\r\n"
# What templates put between the prompt and an answer without reasoning: Qwen3 and others, gpt-oss.
_OPENING = re.compile(rb"\s*(?:<think>\s*</think>|<\|channel\|>\s*final\s*<\|message\|>)\s*")


@dataclass(frozen=True, kw_only=True)
class TextRow:
    """A token row and its tokenizer; ``labels`` unshifted, -100 where a token is not scored."""

    input_ids: Sequence[int] | NDArray[np.integer]
    labels: Sequence[int] | NDArray[np.integer]
    reader: Reader

    @cached_property
    def ids(self) -> Ids:
        """The tokens."""
        return np.asarray(self.input_ids, np.int64)

    @cached_property
    def scored(self) -> NDArray[np.bool_]:
        """Which of them are scored; never the first, which nothing predicts."""
        found = np.asarray(self.labels) != UNSCORED
        found[:1] = False
        return found

    @cached_property
    def usable(self) -> NDArray[np.bool_]:
        """Which of them a chunk may hold: those scored that stand for one text."""
        unknown = self.reader.unknown
        return self.scored & ~np.isin(self.ids, list(unknown)) if unknown else self.scored


@dataclass(kw_only=True)
class Aligned:
    """The chunk of each token of both rows, 0..``count`` - 1, -1 for none; ``different``: turns whose texts differ.

    ``answer``: the teacher's token with which the student's last turn starts there; None when the teacher's row ends before.
    """

    student: Ids
    teacher: Ids
    count: int = 0
    different: int = 0
    answer: int | None = None


@dataclass(frozen=True, kw_only=True)
class _Stretch:
    """Tokens of a row that follow one another: up to ``text`` they spell text, those up to ``end`` are special."""

    row: TextRow
    start: int
    text: int
    end: int

    @classmethod
    def of(cls, row: TextRow, start: int, end: int) -> _Stretch:
        text = end
        while text > start and row.input_ids[text - 1] in row.reader.special:
            text -= 1
        return cls(row=row, start=start, text=text, end=end)

    @cached_property
    def ids(self) -> Ids:
        return self.row.ids[self.start : self.text]

    @cached_property
    def spelled(self) -> bytes:
        return self.row.reader.text(self.ids.tolist())

    @cached_property
    def spans(self) -> Ids:
        return end_to_end(self.row.reader.sizes(self.ids))

    @property
    def leads(self) -> list[int]:
        """How many bytes may stand before what both sides share: white space, and what a template opens an answer with."""
        blank = len(self.spelled) - len(self.spelled.lstrip(_SPACE))
        opening = _OPENING.match(self.spelled)
        return [blank] if opening is None else [blank, opening.end()]

    def token_at(self, byte: int) -> int:
        """The row's first token that ends behind ``byte``."""
        return self.start + int((self.spans[:, 1] <= byte).sum())


def aligned(student: TextRow, teacher: TextRow) -> Aligned:
    """The chunks of two rows; all tokens of a chunk are scored, and none is unknown.

    Rows of one text are aligned from its first byte, those of two chat templates turn by turn: the tokens with which a turn
    closes on both sides are a chunk, turns of unequal texts have none. White space, or an empty block of reasoning, that only
    one side's chat template puts around a turn, and a cut at the end of one side, leave the rest of a turn comparable.
    """
    found = Aligned(student=np.full(len(student.ids), -1), teacher=np.full(len(teacher.ids), -1))
    ours, theirs = list(_turns(student)), list(_turns(teacher))
    if 0 < len(ours) <= len(theirs):
        found.answer = theirs[len(ours) - 1].start
    if _add_row(found, student, teacher):
        return found
    for a, b in zip(ours, theirs, strict=False):
        same = next((s for s in (_Same.of(a, b, *leads) for leads in product(a.leads, b.leads)) if s is not None), None)
        if same is None or same.shifted:
            found.different += 1
            continue
        same.add(found)
        if a is ours[-1] and same.opens_teacher:
            found.answer = b.token_at(same.origins[1])
    return found


def _turns(row: TextRow) -> Iterator[_Stretch]:
    """The stretches of scored tokens."""
    edges = np.flatnonzero(np.diff(row.scored.astype(np.int8), prepend=0, append=0))
    for start, end in edges.reshape(-1, 2).tolist():
        yield _Stretch.of(row, start, end)


def _add_row(found: Aligned, student: TextRow, teacher: TextRow) -> bool:
    """The chunks of rows of one text, whether or not a beginning of text stands before it; False for other rows."""
    for a, b in product(_bodies(student), _bodies(teacher)):
        if a.spelled and b.spelled and (same := _Same.of(a, b, a.leads[0], b.leads[0])) is not None:
            same.add(found)
            return True
    return False


def _bodies(row: TextRow) -> list[_Stretch]:
    """The row behind its first special tokens, and all of it."""
    special = row.reader.special
    first = next((i for i, index in enumerate(row.input_ids) if index not in special), len(row.ids))
    return [_Stretch.of(row, start, len(row.ids)) for start in sorted({first, 0}, reverse=True)]


@dataclass(frozen=True, kw_only=True)
class _Same:
    """Two stretches that share ``length`` bytes from byte ``origins`` of each on: to the end of both (``whole``) or of one."""

    a: _Stretch
    b: _Stretch
    leads: tuple[int, int]
    origins: tuple[int, int]
    length: int
    whole: bool

    @classmethod
    def of(cls, a: _Stretch, b: _Stretch, lead_a: int, lead_b: int) -> _Same | None:
        """None where behind so many bytes of each the texts go apart."""
        before = a.spelled[:lead_a], b.spelled[:lead_b]
        both = common_prefix(before[0][::-1], before[1][::-1])  # more than that stands in front of one alone
        origins = (lead_a - both, lead_b - both)
        first, second = (side.spelled[origin:] for side, origin in zip((a, b), origins, strict=True))
        ends = first.rstrip(_SPACE), second.rstrip(_SPACE)
        if not first.startswith(ends[1]) and not second.startswith(ends[0]):
            return None
        least = min(map(len, ends))
        length = least + common_prefix(first[least:], second[least:])
        return cls(a=a, b=b, leads=(lead_a, lead_b), origins=origins, length=length, whole=ends[0] == ends[1])

    @property
    def opens_teacher(self) -> bool:
        """Whether the teacher's template alone opens the answer with more than white space."""
        opened = [lead > side.leads[0] for lead, side in zip(self.leads, (self.a, self.b), strict=True)]
        return opened[1] and not opened[0]

    @property
    def shifted(self) -> bool:
        """Whether one is the start of the other by chance too: with a first token of which bytes belong to the prompt.

        The text is then one part again and again, and nothing tells how often it stands in front.
        """
        if self.whole:
            return False
        first, second = (side.spelled[origin:] for side, origin in zip((self.a, self.b), self.origins, strict=True))
        short, long = sorted((first.rstrip(_SPACE), second.rstrip(_SPACE)), key=len)
        widths = [int(side.spans[0, 1]) for side in (self.a, self.b) if len(side.spans)]
        shifts = range(1, max(widths, default=0))
        return any(long.startswith(short, k) or (k < len(short) and long.startswith(short[k:])) for k in shifts)

    def add(self, found: Aligned) -> None:
        """The chunks of the shared text, and of the tokens that close it."""
        sides, usable = (self.a, self.b), []
        skipped = [side.token_at(origin) - side.start for side, origin in zip(sides, self.origins, strict=True)]
        spans = [side.spans[n:] - origin for side, n, origin in zip(sides, skipped, self.origins, strict=True)]
        pieces = chunks(*spans)
        pieces = pieces[spans[0][pieces[:, 1] - 1, 1] <= self.length]
        for i, (side, n) in enumerate(zip(sides, skipped, strict=True)):
            unusable = np.concatenate([[0], (~side.row.usable[side.start + n : side.text]).cumsum()])
            usable.append(unusable[pieces[:, 2 * i]] == unusable[pieces[:, 2 * i + 1]])
        kept = usable[0] & usable[1]
        kept[:1] &= all(len(span) > 0 and span[0, 0] == 0 for span in spans)  # else one has bytes before the shared text
        number = np.append(np.where(kept, kept.cumsum() - 1 + found.count, -1), -1)  # the last stands for none
        for i, (side, n, ids) in enumerate(zip(sides, skipped, (found.student, found.teacher), strict=True)):
            ids[side.start + n : side.text] = number[chunk_ids(pieces, side=i, length=len(spans[i]))]
        found.count += int(kept.sum())
        if self.whole and all(side.text < side.end and side.row.usable[side.text] for side in sides):
            found.student[self.a.text] = found.teacher[self.b.text] = found.count
            found.count += 1
