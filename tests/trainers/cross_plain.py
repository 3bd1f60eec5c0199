"""Distillation between tokenizers once more: one row after another, whole logits, chunks found byte by byte, plain autograd."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

from kdlib.data import Prepared
from kdlib.data.aligned import Reader, prepare_aligned
from kdlib.objectives.cross import ALM, ULD, CrossTokenizerObjective, HybridULD
from kdlib.teachers import HFTeacher
from kdlib.trainers import CrossTokenizerTrainer
from tests.tiny import tiny_llama, tiny_tokenizer
from tests.tokenizers.families import llama2
from tests.trainers.small import V, double, settings

Chunk = tuple[list[int], list[int]]  # which tokens of the student's row and of the teacher's
# Words of which the student's tokenizer knows some whole and the teacher's others.
QUESTIONS = ["How many did she sell in all?", "Is the sky blue?", "Natalia sold 48 clips in April,", "What is two plus two?"]
ANSWERS = [" 48 + 24 = 72.", " The answer is four, and many clips.", " yes: half as many in May", " four tea boxes"]
PAIRS = [{"prompt": QUESTIONS[i % 4], "completion": ANSWERS[(i + i // 4) % 4] + " so" * (i % 3)} for i in range(16)]
TEXT_ROWS = [{"text": pair["prompt"] + pair["completion"]} for pair in PAIRS]


@cache
def teachers_tokenizer() -> PreTrainedTokenizerFast:
    """Llama-2 style: spaces are ``▁``, one more stands before each text, other characters are bytes."""
    tokenizer = llama2()
    tokenizer.pad_token = "</s>"
    tokenizer.chat_template = (
        "{% for m in messages %}{{ '[' + m['role'] + ']' + m['content'] }}{% if m['role'] == 'assistant' %}{{ eos_token }}"
        "{% endif %}{{ '\n' }}{% endfor %}{% if add_generation_prompt %}{{ '[assistant]' }}{% endif %}"
    )
    return tokenizer


W = len(teachers_tokenizer())


def other_model(seed: int = 1, *, dtype: torch.dtype = torch.float64, **config: Any) -> Any:
    """A teacher for ``teachers_tokenizer``; its vocabulary is padded, its width not the student's."""
    return tiny_llama(W + 6, seed=seed, **{"hidden": 24, **config}).to(dtype)


def other_teacher(seed: int = 1, **config: Any) -> HFTeacher:
    return HFTeacher(other_model(seed, **config), tokenizer=teachers_tokenizer())


@cache
def spelled(tokenizer: PreTrainedTokenizerBase) -> list[bytes]:
    """The bytes of each token, special ones as they are written."""
    pieces = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    if tokenizer is not teachers_tokenizer():
        table = {character: byte for byte, character in bytes_to_unicode().items()}
        special = set(tokenizer.all_special_tokens) | set(map(str, tokenizer.added_tokens_decoder.values()))
        return [piece.encode() if piece in special else bytes(table[x] for x in piece) for piece in pieces]
    return [bytes([int(p[3:5], 16)]) if p.startswith("<0x") else p.replace("▁", " ").encode() for p in pieces]


def is_special(tokenizer: PreTrainedTokenizerBase, token: int) -> bool:
    return token in tokenizer.added_tokens_decoder and tokenizer.added_tokens_decoder[token].special


@dataclass(kw_only=True)
class Side:
    """A row as one of the models reads it: ``first`` is its first scored token, ``text`` where its text starts and ends."""

    tokenizer: PreTrainedTokenizerBase
    ids: list[int]
    first: int
    text: tuple[int, int]
    logp: Tensor = field(default_factory=lambda: torch.empty(0))  # [S, V], of the token after each
    hidden: Tensor = field(default_factory=lambda: torch.empty(0))  # [S, D]

    @property
    def pieces(self) -> list[bytes]:
        return [spelled(self.tokenizer)[token] for token in self.ids[slice(*self.text)]]

    def of(self, token: int) -> Tensor:
        """log-prob of the token at a place, given all before it."""
        return self.logp[token - 1, self.ids[token]]

    def run(self, *models: Any, size: int) -> None:
        """Fills in what a model says, or the mean of several."""
        said = []
        for model in models:
            self.hidden = model.model(input_ids=torch.tensor([self.ids])).last_hidden_state[0]
            said.append(model.lm_head(self.hidden)[:, :size].log_softmax(-1))
        self.logp = torch.stack(said).logsumexp(0) - math.log(len(said))


def side(tokenizer: PreTrainedTokenizerBase, row: dict[str, str]) -> Side:
    if "text" in row:
        ids = [*tokenizer.encode(row["text"], add_special_tokens=False), tokenizer.eos_token_id]
        return Side(tokenizer=tokenizer, ids=ids, first=1, text=(0, len(ids) - 1))
    prompt, whole = (tokenizer.encode(x, add_special_tokens=False) for x in (row["prompt"], row["prompt"] + row["completion"]))
    assert whole[: len(prompt)] == prompt, "a row for these tests has its border between tokens"
    return answered(tokenizer, prompt, [*whole[len(prompt) :], tokenizer.eos_token_id])


def sides(row: dict[str, str]) -> tuple[Side, Side]:
    return side(tiny_tokenizer_(), row), side(teachers_tokenizer(), row)


def answered(tokenizer: PreTrainedTokenizerBase, prompt: list[int], answer: list[int]) -> Side:
    """A prompt and what is scored after it."""
    ids, end = [*prompt, *answer], len(prompt) + len(answer)
    while end > len(prompt) and is_special(tokenizer, ids[end - 1]):
        end -= 1
    return Side(tokenizer=tokenizer, ids=ids, first=len(prompt), text=(len(prompt), end))


def chunks_of(a: Side, b: Side) -> list[Chunk]:
    """Cuts the common text wherever a token ends on both sides; special tokens at the end of both are the last chunk."""
    texts = [b"".join(one.pieces) for one in (a, b)]
    extra = [len(text) - len(min(texts, key=len)) for text in texts]  # the space before the teacher's text
    assert texts[0][extra[0] :] == texts[1][extra[1] :] and max(extra) <= 1, texts
    spans: list[list[tuple[int, int, int]]] = []
    for one, more in zip((a, b), extra, strict=True):
        spans.append([])
        for i, piece in enumerate(one.pieces):
            start = sum(map(len, one.pieces[:i])) - more
            spans[-1].append((start, start + len(piece), one.text[0] + i))
    ends = sorted({end for _, end, _ in spans[0]} & {end for _, end, _ in spans[1]} - {0})
    found: list[Chunk] = []
    for low, high in zip([0, *ends], ends, strict=False):
        inside = [[(start, i) for start, end, i in of if low < end <= high] for of in spans]
        events = all(start >= 0 and i >= one.first for one, of in zip((a, b), inside, strict=True) for start, i in of)
        found += [([i for _, i in inside[0]], [i for _, i in inside[1]])] if events else []
    closed = a.text[1] < len(a.ids) and b.text[1] < len(b.ids)
    return [*found, ([a.text[1]], [b.text[1]])] if closed else found


@dataclass(kw_only=True)
class Plain:
    """The sums of the terms over some rows, what they are divided by, and of each row its chunks and the student's states."""

    objective: CrossTokenizerObjective
    sums: dict[str, Tensor]
    counts: dict[str, int]
    chunks: list[list[Chunk]]
    hidden: list[Tensor]

    def mean(self, term: str) -> Tensor:
        return self.sums[term] / self.counts[term]

    @property
    def weights(self) -> dict[str, float]:
        given = {"distill": self.objective.weight, **self.objective.side_weights, "cross_entropy": self.objective.cross_entropy}
        return {name: weight for name, weight in given.items() if weight}

    def loss(self, weights: dict[str, float] | None = None) -> Tensor:
        return torch.stack([weight * self.mean(name) for name, weight in (weights or self.weights).items()]).sum()

    def norms(self) -> dict[str, float]:
        """|d mean / d H| of each term, H all hidden states."""
        found = {}
        for name in self.weights:
            parts = torch.autograd.grad(self.mean(name), self.hidden, retain_graph=True, allow_unused=True)
            found[name] = math.sqrt(sum(float(part.square().sum()) for part in parts if part is not None))
        return found


def plain(student: nn.Module, teacher: Any, rows: Sequence[Any], objective: Any, *, projection: Tensor | None = None) -> Plain:
    """``rows`` as users give them, or pairs of Sides; ``teacher`` a model or a tuple of them, without gradient."""
    sums = {name: [torch.zeros((), dtype=torch.float64)] for name in ("distill", "hidden", "cross_entropy")}
    counts, hidden, every = dict.fromkeys(sums, 0), [], []
    for row in rows:
        a, b = row if isinstance(row, tuple) else sides(row)
        a.run(student, size=V)
        with torch.no_grad():
            b.run(*(teacher if isinstance(teacher, tuple) else (teacher,)), size=W)
        chunks = chunks_of(a, b)
        sums["distill"].append(VALUES[type(objective)](objective, a, b, chunks))
        sums["hidden"].append(states(a, b, chunks, projection))
        sums["cross_entropy"].append(-torch.stack([a.of(i) for i in range(a.first, len(a.ids))]).sum())
        counts["distill"] += len(chunks)
        counts["cross_entropy"] += len(a.ids) - a.first
        hidden.append(a.hidden)
        every.append(chunks)
    counts["hidden"] = counts["distill"]
    totals = {name: torch.stack(values).sum() for name, values in sums.items()}
    return Plain(objective=objective, sums=totals, counts=counts, chunks=every, hidden=hidden)


@cache
def tiny_tokenizer_() -> PreTrainedTokenizerFast:
    return tiny_tokenizer()


def alm(objective: ALM, a: Side, b: Side, chunks: list[Chunk]) -> Tensor:
    """Chunks are put together from left to right until one closes."""
    values, together = [], ([torch.zeros(())] * 0, [torch.zeros(())] * 0)
    size = 0
    for number, chunk in enumerate(chunks):
        size += 1
        ends = [mass_of_ends(one, tokens[-1]) for one, tokens in zip((a, b), chunk, strict=True)]
        both = ends[0] is not None and ends[1] is not None
        for of, one, tokens in zip(together, (a, b), chunk, strict=True):
            of.extend(one.of(i) for i in tokens)
        following = chunks[number + 1] if number + 1 < len(chunks) else None
        goes_on = following is not None and all(after[0] == now[-1] + 1 for now, after in zip(chunk, following, strict=True))
        if objective.threshold and both and goes_on and ends[1] <= math.log(objective.threshold):
            continue
        if objective.debias and both:
            for of, end in zip(together, ends, strict=True):
                of.append(end)
        y, x = (torch.stack(of).sum() / objective.temperature for of in together)
        values.append(size * objective.temperature * bernoulli(x, y, objective.divergence))
        together, size = ([], []), 0
    assert not size
    return torch.stack(values).sum()


def mass_of_ends(one: Side, token: int) -> Any:
    """log-prob of white space or a special token after a token; None where what follows is not scored."""
    if token + 1 >= len(one.ids):
        return None
    ends = [i for i, text in enumerate(spelled(one.tokenizer)) if text[:1].isspace() or is_special(one.tokenizer, i)]
    return one.logp[token, ends].exp().sum().log()


def bernoulli(x: Tensor, y: Tensor, divergence: str) -> Tensor:
    p, q = (torch.stack([z.exp(), 1 - z.exp()]) for z in (x, y))
    if divergence == "total_variation":
        return (p - q).abs().sum() / 2
    return (p * (p.log() - q.log())).sum()


def states(a: Side, b: Side, chunks: list[Chunk], projection: Tensor | None) -> Tensor:
    """|W h_s - h_t|^2 / |h_t|^2 at the last token of each chunk that scored tokens follow on both sides."""
    found = [torch.zeros((), dtype=torch.float64)]
    if projection is None:
        return found[0]
    for mine, theirs in chunks:
        if mine[-1] + 1 < len(a.ids) and theirs[-1] + 1 < len(b.ids):
            target = b.hidden[theirs[-1]]
            ours = (projection @ a.hidden[mine[-1]].to(projection.dtype)).to(target.dtype)
            found.append((ours - target).square().sum() / target.square().sum())
    return torch.stack(found).sum()


def split(one: Side, tokens: list[int]) -> tuple[Tensor, Tensor, Tensor]:
    """Probabilities [V] where a chunk begins, of the chunk, and of its first token going on otherwise."""
    p = one.logp[tokens[0] - 1].exp()
    later = torch.stack([one.of(i) for i in tokens[1:]]).sum().exp() if len(tokens) > 1 else torch.ones((), dtype=p.dtype)
    first = p[one.ids[tokens[0]]]
    return p, first * later, first * (1 - later)


def by_rank(a: Tensor, b: Tensor) -> Tensor:
    a, b = (x.sort(descending=True).values for x in (a, b))
    n = min(len(a), len(b))
    return (a[:n] - b[:n]).abs().sum() + a[n:].sum() + b[n:].sum()


def uld(objective: ULD, a: Side, b: Side, chunks: list[Chunk]) -> Tensor:
    values = []
    for chunk in chunks:
        sides = []
        for one, tokens in zip((a, b), chunk, strict=True):
            p, whole, other = split(one, tokens)
            rest = p[torch.arange(len(p)) != one.ids[tokens[0]]]
            sides.append(torch.cat([rest, whole[None], other[None]]))
        values.append(by_rank(*sides))
    return torch.stack(values).sum()


@cache
def matched() -> dict[int, int]:
    """Ids of the tokens of both vocabularies that spell the same text; the two ends of text are one."""
    mine, theirs = tiny_tokenizer_(), teachers_tokenizer()
    found = {mine.eos_token_id: theirs.eos_token_id, mine.bos_token_id: theirs.bos_token_id}
    names = theirs.convert_ids_to_tokens(list(range(W)))
    text: dict[bytes, int] = {}
    for i in sorted(range(W), key=lambda i: (names[i].startswith("<0x"), i)):
        if not is_special(theirs, i):
            text.setdefault(spelled(theirs)[i], i)
    for i, piece in enumerate(spelled(mine)):
        if not is_special(mine, i) and piece in text:
            found[i] = text[piece]
    return found


def hybrid(objective: HybridULD, a: Side, b: Side, chunks: list[Chunk]) -> Tensor:
    pairs, values = matched(), []
    share = len(pairs) / W
    for chunk in chunks:
        (q, whole_q, other_q), (p, whole_p, other_p) = (split(one, tokens) for one, tokens in zip((a, b), chunk, strict=True))
        first = a.ids[chunk[0][0]], b.ids[chunk[1][0]]
        alike = [(i, j) for i, j in pairs.items() if i != first[0] and j != first[1]]
        mine, theirs = ([pair[n] for pair in alike] for n in (0, 1))
        alone = [sorted(set(range(len(x))) - {*used, own}) for x, used, own in ((q, mine, first[0]), (p, theirs, first[1]))]
        rest = [torch.cat([x[ids], other[None]]) for x, ids, other in ((q, alone[0], other_q), (p, alone[1], other_p))]
        outcomes = [
            torch.cat([x[ids], whole[None], out.sum()[None]])
            for x, ids, whole, out in ((q, mine, whole_q, rest[0]), (p, theirs, whole_p, rest[1]))
        ]
        m = objective.beta * outcomes[1] + (1 - objective.beta) * outcomes[0]
        kl = [(x * (x / m).log()).sum() for x in outcomes]
        values.append(share * (objective.beta * kl[1] + (1 - objective.beta) * kl[0]) + (1 - share) * by_rank(*rest))
    return torch.stack(values).sum()


VALUES: dict[type, Callable[..., Tensor]] = {ALM: alm, ULD: uld, HybridULD: hybrid}


def speaking() -> Any:
    """A student whose likeliest tokens are plain text."""
    student = double()
    for token, text in enumerate(spelled(tiny_tokenizer_())):
        if not text.isascii() or is_special(tiny_tokenizer_(), token):
            student.lm_head.weight.data[token] = 0.0
    return student


class Watched(CrossTokenizerTrainer):
    """A trainer that keeps each batch whose positions it finds, and computes what its objective trains in float64."""

    def __init__(self, *arguments: Any, **given: Any) -> None:
        self.batches: list[dict[str, Any]] = []
        super().__init__(*arguments, **given)

    def extend_student(self, student: nn.Module, args: Any) -> None:
        super().extend_student(student, args)
        student.double()

    def positions(self, batch: dict[str, Any]) -> Any:
        self.batches.append(batch)
        return super().positions(batch)


@cache
def rows_of(names: str, first: int, last: int) -> Prepared:
    """Rows that were tokenised once for all tests."""
    given = {"texts": TEXT_ROWS, "pairs": PAIRS}[names][first:last]
    readers = (Reader(tiny_tokenizer_()), Reader(teachers_tokenizer()))
    return prepare_aligned(Dataset.from_list(given), *readers, max_length=512)


def cross_trainer(
    directory: Path, objective: Any = None, *, rows: Any = None, config: dict[str, Any] | None = None, **given: Any
) -> Watched:
    """A step of eight rows, in float64; ``given`` replaces arguments, ``config`` options."""
    arguments = {
        "model": double(),
        "teacher": other_teacher(),
        "train_dataset": rows_of("pairs", 0, 8) if rows is None else rows,
        "processing_class": tiny_tokenizer_(),
        **given,
    }
    options = {"per_device_train_batch_size": 8, "max_grad_norm": 1e9, **(config or {})}
    return Watched(**arguments, objective=objective, args=settings(directory, **options))
