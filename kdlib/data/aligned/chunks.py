"""Token rows of one text in two tokenisations: which tokens of them spell the same bytes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from kdlib.data.aligned.reader import Reader
from kdlib.data.draft import UNSCORED, common_prefix
from kdlib.tokenizers.align import chunk_ids, chunks, end_to_end

Ids = NDArray[np.int64]
_SPACE = b" \t\r\n"


@dataclass(frozen=True, kw_only=True)
class TextRow:
    """A token row and its tokenizer; ``labels`` unshifted, -100 where a token is not scored."""

    input_ids: Sequence[int]
    labels: Sequence[int]
    reader: Reader


@dataclass(kw_only=True)
class Aligned:
    """The chunk of each token of both rows, 0..``count`` - 1, -1 for none; ``different``: turns whose texts differ."""

    student: Ids
    teacher: Ids
    count: int = 0
    different: int = 0


@dataclass(frozen=True, kw_only=True)
class _Turn:
    """Scored tokens of a row that follow one another: up to ``text`` they spell text, those up to ``end`` are special."""

    row: TextRow
    start: int
    text: int
    end: int

    @property
    def ids(self) -> Sequence[int]:
        return self.row.input_ids[self.start : self.text]

    def spans(self, origin: int) -> Ids:
        """Spans of the tokens of text, counted from byte ``origin`` of the turn."""
        return end_to_end(self.row.reader.lengths[list(self.ids)]) - origin


def aligned(student: TextRow, teacher: TextRow) -> Aligned:
    """The chunks of two rows, turn by turn; all tokens of a chunk are scored.

    The special tokens that close a turn on both sides are a chunk. Turns of unequal texts have none. White space that only one
    side's chat template puts around a turn, and a cut at the end of one side, leave the rest of a turn comparable.
    """
    found = Aligned(student=np.full(len(student.input_ids), -1), teacher=np.full(len(teacher.input_ids), -1))
    for turns in zip(_turns(student), _turns(teacher), strict=False):
        matched = next((m for m in map(_matched, *zip(*_starts(turns), strict=True)) if m is not None), None)
        if matched is None:
            found.different += 1
        else:
            _add(found, *matched)
    return found


def _turns(row: TextRow) -> Iterator[_Turn]:
    scored = np.asarray(row.labels) != UNSCORED
    edges = np.flatnonzero(np.diff(scored.astype(np.int8), prepend=0, append=0))
    for start, end in edges.reshape(-1, 2).tolist():
        text = end
        while text > start and row.input_ids[text - 1] in row.reader.special:
            text -= 1
        yield _Turn(row=row, start=start, text=text, end=end)


def _starts(turns: tuple[_Turn, _Turn]) -> list[tuple[_Turn, _Turn]]:
    """The turns as they are, and with the first token of a row before them: nothing predicts it, but it may be their text."""
    sides = [
        [turn, replace(turn, start=0)] if turn.start == 1 and turn.row.input_ids[0] not in turn.row.reader.special else [turn]
        for turn in turns
    ]
    return [(a, b) for a in sides[0] for b in sides[1]]


Matched = tuple[_Turn, _Turn, tuple[int, int], bool]


def _matched(a: _Turn, b: _Turn) -> Matched | None:
    """Both turns, the byte of each where their shared text starts, and whether both go on to its end; None without one."""
    texts = a.row.reader.text(a.ids), b.row.reader.text(b.ids)
    before = [text[: len(text) - len(text.lstrip(_SPACE))] for text in texts]
    same = common_prefix(before[0][::-1], before[1][::-1])  # more than that stands in front of one alone
    origins = (len(before[0]) - same, len(before[1]) - same)
    first, second = (text[origin:] for text, origin in zip(texts, origins, strict=True))
    ends = first.rstrip(_SPACE), second.rstrip(_SPACE)
    if not first.startswith(ends[1]) and not second.startswith(ends[0]):
        return None
    return a, b, origins, ends[0] == ends[1]


def _add(found: Aligned, a: _Turn, b: _Turn, origins: tuple[int, int], whole: bool) -> None:
    """The chunks of one turn."""
    spans = [turn.spans(origin) for turn, origin in zip((a, b), origins, strict=True)]
    skipped = [int((side[:, 1] <= 0).sum()) for side in spans]
    pieces = chunks(*(side[n:] for side, n in zip(spans, skipped, strict=True)))
    # a first chunk with bytes before the shared text, or with a token that nothing predicts, is not one event in both models
    dropped = len(pieces) > 0 and any(
        side[n, 0] != 0 or turn.row.labels[turn.start + n] == UNSCORED
        for side, n, turn in zip(spans, skipped, (a, b), strict=True)
    )
    for side, (turn, n, ids) in enumerate(zip((a, b), skipped, (found.student, found.teacher), strict=True)):
        local = chunk_ids(pieces, side=side, length=len(spans[side]) - n) - dropped
        ids[turn.start + n : turn.text] = np.where(local < 0, -1, local + found.count)
    found.count += len(pieces) - dropped
    if whole and a.text < a.end and b.text < b.end:
        found.student[a.text] = found.teacher[b.text] = found.count
        found.count += 1
