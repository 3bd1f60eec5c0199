"""Models that read the text of another model's tokens in tokens of their own, and say in its tokens what comes next."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from kdlib.data.collate import DistillationCollator
from kdlib.data.draft import UNSCORED
from kdlib.kernels.outcomes import top_k
from kdlib.teachers.hf import HFTeacher
from kdlib.teachers.vllm import _samples
from kdlib.tokenizers.alignment import end_to_end
from kdlib.tokenizers.pieces import token_bytes
from kdlib.tokenizers.projection import special_tokens, token_projection
from kdlib.tokenizers.spans import LossyTokenizationError, byte_spans
from kdlib.types import Positions

_logger = logging.getLogger("kdlib")
_ROWS = 256  # whose log-probs over a whole vocabulary are made at a time
_NOWHERE = -1  # where special tokens before and behind a text end: no row stands there

Ints = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class Votes:
    """What a model says about rows: ``p`` [n, K] of tokens ``ids`` [n, K] of the main's vocabulary, -1 and 0 for tokens that
    have no place there, and ``tail`` [n], the mass of all other tokens. All of a row is 0 where the model says nothing.
    """

    ids: Tensor
    p: Tensor
    tail: Tensor

    def __getitem__(self, rows: slice | Tensor) -> Votes:
        return Votes(ids=self.ids[rows], p=self.p[rows], tail=self.tail[rows])

    def at(self, ids: Tensor) -> Tensor:
        """[n, C]: p of these ``ids`` [n, C], the sum where several of the model's own tokens became one."""
        return ((ids[:, :, None] == self.ids[:, None, :]) * self.p[:, None, :]).sum(-1)


@dataclass(frozen=True, kw_only=True)
class Text:
    """What a sample's tokens spell, and where its ``rows`` [r] stand in it: ``ends`` [r], the byte behind each row's token."""

    text: str
    rows: Ints
    ends: Ints


class Spelled:
    """The texts that a tokenizer's ids stand for."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.pieces, self.special = token_bytes(tokenizer), special_tokens(tokenizer)
        self.lengths = np.array([len(piece) for piece in self.pieces], np.int64)
        self.adds_space = adds_space(tokenizer)

    def texts(self, batch: Mapping[str, Any], positions: Positions) -> Iterator[Text]:
        """The text of each sample of a batch, up to its last scored token and as far as it is UTF-8, with the rows in it."""
        for sample in _samples(batch, positions, follow=True):
            spelled, ends = self._text(sample.row.tokens)
            text, stands = _valid(spelled), ends[sample.row.wanted]
            inside = (stands >= 0) & (stands <= len(text.encode()))
            yield Text(text=text, rows=sample.places.numpy()[inside], ends=stands[inside])

    def _text(self, ids: Sequence[int]) -> tuple[bytes, Ints]:
        """The bytes of the tokens between the special ones at the ends, and the byte behind each token [n].

        The last special token before the text stands at byte 0, but where the first token has a space of the tokenizer's own,
        which is not in the text: what such a token predicts is another's second.
        """
        text = [index for index, token in enumerate(ids) if token not in self.special]
        first, last = (text[0], text[-1] + 1) if text else (len(ids), len(ids))
        inside = list(ids[first:last])
        spelled = b"".join(self.pieces[index] for index in inside)
        space = int(self.adds_space and spelled[:1] == b" ")
        ends = np.full(len(ids), _NOWHERE, np.int64)
        ends[first:last] = end_to_end(self.lengths[inside])[:, 1] - space
        ends[max(first - 1, 0) : first] = -space
        return spelled[space:], ends


class Voter:
    """``teacher``, of another tokenizer, in the tokens of ``main``. Raises ValueError for tokenizers of unknown bytes."""

    def __init__(self, teacher: HFTeacher, main: HFTeacher) -> None:
        assert teacher.tokenizer is not None and main.tokenizer is not None
        assert teacher.vocab_size is not None and main.vocab_size is not None
        self.teacher, self.tokenizer = teacher, teacher.tokenizer
        sizes = (teacher.vocab_size, main.vocab_size)
        ids, weights = token_projection(self.tokenizer, main.tokenizer, sizes=sizes, width=1, decay=0.0)
        self.becomes = torch.where(weights[:, 0] > 0, ids[:, 0], -1)
        self._adds_space, self._special = adds_space(self.tokenizer), special_tokens(self.tokenizer)
        self._warned = False

    def votes(self, texts: Sequence[Text], *, n: int, k: int, device: torch.device) -> Votes:
        """Its ``k`` likeliest next tokens at those rows of the ``texts``, out of ``n``, at which a token of its own ends."""
        votes = Votes(
            ids=torch.full((n, k), -1, device=device),
            p=torch.zeros(n, k, device=device),
            tail=torch.zeros(n, device=device),
        )
        found = [(tokens, rows, places) for tokens, rows, places in map(self._shared, texts) if len(rows)]
        if not found:
            return votes
        lines = [{"input_ids": ids, "labels": [UNSCORED] * len(ids), "sample_id": i} for i, (ids, _, _) in enumerate(found)]
        batch = {key: x.to(device) for key, x in DistillationCollator(0)(lines).items()}
        rows = torch.from_numpy(np.concatenate([rows for _, rows, _ in found])).to(device)
        signal = self.teacher.signal(batch, _asked([places for _, _, places in found], batch["input_ids"]))
        becomes = self.becomes.to(device)
        for start in range(0, len(rows), _ROWS):
            chunk = slice(start, start + _ROWS)
            top = top_k(signal.at(chunk, 1.0), k)
            assert top.ids is not None
            votes.ids[rows[chunk]] = ids = becomes[top.ids]
            votes.p[rows[chunk]] = torch.where(ids >= 0, top.logp.exp(), 0.0).to(votes.p.dtype)
            votes.tail[rows[chunk]] = top.rest.exp().to(votes.tail.dtype)
        return votes

    def _shared(self, text: Text) -> tuple[list[int], Ints, Ints]:
        """The tokens that are read, the rows [r] that stand where one of them ends, and after which of them that is [r]."""
        try:
            ids, spans = byte_spans(self.tokenizer, text.text, add_special_tokens=True)
        except LossyTokenizationError as error:
            self._warn(error)
            return [], text.rows[:0], text.ends[:0]
        while ids and ids[-1] in self._special and spans[len(ids) - 1, 0] == spans[len(ids) - 1, 1]:
            ids = ids[:-1]  # the end of a text is not read
        ends = spans[: len(ids), 1]
        at = np.searchsorted(ends, text.ends, side="right") - 1
        same = (at >= 0) & (text.ends >= int(self._adds_space))
        same[same] = ends[at[same]] == text.ends[same]
        last = at[same].max(initial=-1) + 1
        return ids[:last], text.rows[same], at[same]

    def _warn(self, error: LossyTokenizationError) -> None:
        if not self._warned:
            _logger.warning("%s is left out of the ensemble in texts that its tokenizer changes: %s", self.teacher.name, error)
        self._warned = True


def adds_space(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the tokenizer puts a space before a text."""
    pieces = token_bytes(tokenizer)
    return b"".join(pieces[index] for index in tokenizer.encode("a", add_special_tokens=False)) == b" a"


def _asked(places: Sequence[Ints], input_ids: Tensor) -> Positions:
    """The positions after the tokens ``places`` of each line of ``input_ids`` [B, S]."""
    line = np.repeat(np.arange(len(places)), [len(part) for part in places])
    index = torch.from_numpy(line * input_ids.shape[1] + np.concatenate(places)).to(input_ids.device)
    return Positions(index=index, labels=torch.zeros_like(index), sequence=torch.from_numpy(line).to(index.device))


def _valid(spelled: bytes) -> str:
    try:
        return spelled.decode()
    except UnicodeDecodeError as error:
        return spelled[: error.start].decode()
