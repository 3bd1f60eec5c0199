"""Masked texts read one at a time, block after block through a cache, and losses on them as loops over tokens."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from kdlib.data.draft import sample_id
from kdlib.diffusion.noise import Noise
from tests.trainers.small import V, forward_kl

MASK, EOS = V, 2  # the next token of the tokenizer, and its end of a text
SIZE = V + 1
FAVOURED = 17  # what a tiny model says of many masked tokens
Terms = dict[str, tuple[Tensor, float]]  # sum and what it is divided by


@dataclass(frozen=True)
class Text:
    """Tokens, which of them are learnt, and the steps in which these were committed."""

    ids: list[int]
    learnt: list[bool]
    steps: list[int]

    def row(self) -> dict[str, Any]:
        """The columns of ``kdlib trajectories diffusion`` that training reads."""
        labels = [token if own else -100 for token, own in zip(self.ids, self.learnt, strict=True)]
        found = {"input_ids": self.ids, "labels": labels, "sample_id": sample_id(self.ids, labels)}
        return {**found, "commit_step": self.steps}


def text(rng: random.Random, *turns: tuple[int, int], end: bool = False) -> Text:
    """Random tokens in turns of (prompt, response) tokens; about three quarters of a response are FAVOURED."""
    ids, learnt = list[int](), list[bool]()
    for prompt, response in turns:
        answer = [FAVOURED if rng.random() < 0.75 else rng.randrange(3, V) for _ in range(response)]
        ids += [*(rng.randrange(3, V) for _ in range(prompt)), *answer]
        learnt += [False] * prompt + [True] * response
    if end:
        ids[-1] = EOS
    return Text(ids, learnt, [rng.randrange(1, 6) for _ in range(sum(learnt))])


def texts(*, seed: int = 0) -> list[Text]:
    """Four rows of unequal lengths; the third has two turns."""
    rng = random.Random(seed)
    turns = [((3, 10),), ((6, 7),), ((2, 5), (3, 6)), ((4, 3),)]
    return [text(rng, *row, end=i % 2 == 0) for i, row in enumerate(turns)]


@dataclass(frozen=True)
class Masked:
    """A text in one step: uniform draws and shares of its tokens, which are masked by chance, and which for certain."""

    ids: list[int]
    learnt: list[bool]
    noise: Noise

    def where(self, share: float | Tensor = 1.0) -> list[bool]:
        return list(self.noise.masked(share)[0].tolist())

    @property
    def segment(self) -> list[bool]:
        return list(self.noise.segment[0].tolist())

    @property
    def tail(self) -> list[bool]:
        return list(self.noise.tail[0].tolist())

    def p(self, c: int) -> float:
        return float(self.noise.p[0, c])

    def shown(self, masked: Sequence[bool], *, ids: Sequence[int] | None = None) -> list[int]:
        """The tokens of a view: ``masked`` ones and the tail are not there."""
        hidden = [a or b for a, b in zip(masked, self.tail, strict=True)]
        return [MASK if own else token for token, own in zip(ids or self.ids, hidden, strict=True)]


Kind = Literal["full", "noisy", "clean"]


@dataclass(frozen=True)
class Reader:
    """How a model reads: all at once, or block by block behind the blocks before, as they are masked or clean."""

    kind: Kind = "full"
    shift: bool = False
    block_length: int = 4
    sequence: bool = False  # blocks are counted from the text's first token

    def __call__(self, model: nn.Module, of: Masked, shown: Sequence[int]) -> list[Tensor]:
        """The log-probs [V] of each token."""
        if self.kind == "full":
            logits = through(model, [list(shown)])
        else:
            blocks = self.blocks(of.learnt)
            masked, clean = ([list(ids[a:b]) for a, b in blocks] for ids in (shown, of.ids))
            logits = through(model, masked)
            if self.kind == "clean":
                return self._behind_text(model, masked, clean)
        said = [logits[max(c - 1, 0)] for c in range(len(shown))] if self.shift else list(logits)
        return [x[:SIZE].log_softmax(-1) for x in said]

    def _behind_text(self, model: nn.Module, masked: list[list[int]], clean: list[list[int]]) -> list[Tensor]:
        said = list[Tensor]()
        for i, block in enumerate(masked):
            own = through(model, [*clean[:i], block])[-len(block) :]
            if self.shift:
                before = through(model, clean[:i])[-1:] if i else own[:1]
                own = torch.cat([before, own[:-1]])
            said += [x[:SIZE].log_softmax(-1) for x in own]
        return said

    def blocks(self, learnt: Sequence[bool]) -> list[tuple[int, int]]:
        """Begin and end of each: runs of prompt are whole, runs of response are cut."""
        found, begin = list[tuple[int, int]](), 0
        for c in range(1, len(learnt) + 1):
            cut = c == len(learnt) or learnt[c] != learnt[begin] or (learnt[begin] and c - begin == self.block_length)
            if self.sequence:
                cut = c == len(learnt) or c - begin == self.block_length
            if cut:
                found.append((begin, c))
                begin = c
        return found


def through(model: nn.Module, blocks: Sequence[list[int]]) -> Tensor:
    """Logits of all tokens [S, V], each block seeing itself and, through a cache, those before."""
    cache, found, start = DynamicCache(), list[Tensor](), 0
    for block in blocks:
        position = torch.arange(start, start + len(block))[None]
        out = model(input_ids=torch.tensor([block]), position_ids=position, past_key_values=cache, use_cache=True)
        found.append(out.logits[0])
        start += len(block)
    return torch.cat(found)


Divergence = Callable[[Tensor, Tensor, Tensor], Tensor]
NOTHING = torch.tensor([0])


def between(divergence: Divergence, p: Tensor, q: Tensor) -> Tensor:
    return divergence(p[None], q[None], NOTHING)[0]


@dataclass(frozen=True)
class Plain:
    """Student, teacher and how both read."""

    student: nn.Module
    read: Reader = field(default_factory=Reader)
    teacher: nn.Module | None = None
    teacher_read: Reader | None = None
    said: dict[Any, list[Tensor]] = field(default_factory=dict)

    def says(self, of: Masked, masked: Sequence[bool]) -> list[Tensor]:
        key = (id(of), *masked)
        if key not in self.said:
            self.said[key] = self.read(self.student, of, of.shown(masked))
        return self.said[key]

    @torch.no_grad()
    def taught(self, of: Masked, masked: Sequence[bool], *, ids: Sequence[int] | None = None) -> list[Tensor]:
        reader = self.teacher_read or self.read
        return reader(self.teacher or self.student, of, of.shown(masked, ids=ids))

    def elbo(self, of: Masked, *, weighting: str, normalize: str) -> Terms:
        masked = of.where()
        n = sum(masked) if weighting == "uniform" else sum(of.segment)
        said, loss = self.says(of, masked), zero()
        for c in (c for c, own in enumerate(masked) if own):
            weight = {"elbo": 1.0 / of.p(c), "uniform": 1.0, "cart": nearness(of, masked, c)}[weighting]
            loss = loss - weight * said[c][of.ids[c]]
        return {"cross_entropy": (loss, n) if normalize == "token" else (loss / max(n, 1), float(n > 0))}

    def cross_entropy(self, of: Masked, masked: Sequence[bool]) -> tuple[Tensor, float]:
        said = self.says(of, masked)
        rows = [-said[c][of.ids[c]] for c, own in enumerate(masked) if own]
        return sum(rows, zero()), len(rows)

    def right(self, of: Masked, masked: Sequence[bool], *, temperature: float) -> tuple[Tensor, float]:
        """The entropies of those predicted right, and how many there are."""
        said, loss, n = self.says(of, masked), zero(), 0
        for c, own in enumerate(masked):
            if own and int(said[c].argmax()) == of.ids[c]:
                logq = (said[c] / temperature).log_softmax(-1)
                loss, n = loss - (logq.exp() * logq).sum(), n + 1
        return loss, n

    def consistency(self, of: Masked, *, divergence: Divergence, low: float = 0.0, high: float = 1.0) -> Terms:
        earlier, later = of.where(), of.where(low + (high - low) * of.noise.v[0])
        said, by_later, by_earlier = self.says(of, earlier), self.taught(of, later), self.taught(of, earlier)
        found = {"consistency": (zero(), 0), "cross_entropy": (zero(), 0), "distill": (zero(), 0)}

        def add(name: str, value: Tensor) -> None:
            found[name] = (found[name][0] + value, found[name][1] + 1)

        for c in (c for c, own in enumerate(earlier) if own):
            add("cross_entropy", -said[c][of.ids[c]])
            name, p = ("consistency", by_later[c]) if later[c] else ("distill", by_earlier[c])
            add(name, between(divergence, p, said[c]))
        return dict(found)

    def sharpened(self, of: Masked, *, temperature: float) -> Terms:
        masked = of.where()
        said, taught, loss, n = self.says(of, masked), self.taught(of, masked), zero(), 0
        for c in (c for c, own in enumerate(masked) if own):
            n += 1
            if int(taught[c].argmax()) == of.ids[c]:
                loss = loss + between(forward_kl, (taught[c] / temperature).log_softmax(-1), said[c])
        return {"distill": (loss, n), "cross_entropy": self.cross_entropy(of, masked)}

    def forcing(self, of: Masked) -> Terms:
        masked = of.where()
        said, taught = self.says(of, masked), self.taught(of, masked)
        rows = [between(forward_kl, taught[c], said[c]) / of.p(c) for c, own in enumerate(masked) if own]
        return {"distill": (sum(rows, zero()), len(rows))}

    def halved(self, of: Masked, *, sampling_steps: int, divergence: Divergence, uniform: Sequence[float]) -> Terms:
        """Two steps of the teacher; ``uniform``: the draw of each token that is unmasked by the first."""
        masked = of.where()
        still = [own and float(of.noise.u[0, c]) < of.p(c) - 1.0 / sampling_steps for c, own in enumerate(masked)]
        first, ids = self.taught(of, masked), list(of.ids)
        for c, own in enumerate(masked):
            if own and not still[c]:
                ids[c] = inverse(first[c], uniform[c])
        second, said = self.taught(of, still, ids=ids), self.says(of, masked)
        rows = [between(divergence, (second if still[c] else first)[c], said[c]) for c, own in enumerate(masked) if own]
        return {"distill": (sum(rows, zero()), len(rows))}


def zero() -> Tensor:
    return torch.zeros((), dtype=torch.float64)


def inverse(logp: Tensor, uniform: float) -> int:
    """The first token at which the distribution function, without MASK, is above ``uniform``."""
    share = logp.exp().tolist()
    share[MASK] = 0.0
    total, below = sum(share), 0.0
    for token, own in enumerate(share):
        below += own / total
        if below > uniform:
            return token
    raise AssertionError


def nearness(of: Masked, masked: Sequence[bool], i: int) -> float:
    known = [j for j, hidden in enumerate(masked) if not hidden and not of.tail[j]]
    return sum(0.5 * 0.3 * 0.7 ** (abs(i - j) - 1) for j in known)


def mean(rows: Sequence[Terms], weights: dict[str, float] | None = None) -> Tensor:
    """The sum over terms of weight * sum / count over all rows."""
    total = zero()
    for name in rows[0]:
        value, count = sum((row[name][0] for row in rows), zero()), sum(row[name][1] for row in rows)
        total = total + (weights or {}).get(name, 1.0) * value / max(count, 1)
    return total
