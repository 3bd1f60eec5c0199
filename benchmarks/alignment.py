"""Tokens per second of byte spans and of the alignment of two tokenisations, beside those of TRL's GOLD.

    python benchmarks/alignment.py [--quick] [--output docs/results/alignment.md]

Questions and answers of GSM8K, or made word problems where they are absent. Before anything is timed the chunks are compared
with those of reading both sides byte by byte, and with TRL's groups where TRL supports the pair (byte-level BPE on both sides).
Times are CPU seconds of one thread, in rounds of all methods one after the other: medians over rounds, ratios within a round.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import shutil
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from time import process_time
from typing import Any

import numpy as np
from numpy.typing import NDArray
from page import markdown_table, write_results
from rich.console import Console
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, LlamaTokenizer, PreTrainedTokenizerFast

from kdlib.data.arithmetic import make_problems
from kdlib.tokenizers.alignment import chunks, end_to_end
from kdlib.tokenizers.pure_bytes import byte_tokenizer
from kdlib.tokenizers.spans import LossyTokenizationError, byte_spans, spans_in_text

ROOT = Path(__file__).resolve().parents[1]
DATA, MODEL = ROOT / "../shared/data/gsm8k/train.jsonl", ROOT / "../shared/models/gsm8k-lm"
AT_ONCE = 64  # texts of a batch that is aligned as one
VOCABULARY = 4096
Spans = NDArray[np.int64]
HEAD = [
    "pair",
    "texts",
    "tokens a text",
    "tokenising alone",
    "spans",
    "alignment, a text",
    f"alignment, {AT_ONCE} texts",
    "all",
]
TRL_HEAD = ["pair", "method", "million tokens/s: kdlib", "TRL", "times TRL", "in all rounds"]


@dataclass(frozen=True, kw_only=True)
class Pair:
    """Two tokenizers and what they make of the texts that neither changes."""

    name: str
    tokenizers: tuple[PreTrainedTokenizerFast, PreTrainedTokenizerFast]
    texts: list[str]
    ids: tuple[list[list[int]], list[list[int]]]
    spans: tuple[list[Spans], list[Spans]]

    @property
    def tokens(self) -> int:
        return sum(len(ids) for side in self.ids for ids in side)

    @property
    def byte_level(self) -> bool:
        return all("ByteLevel" in str(tokenizer.backend_tokenizer.decoder) for tokenizer in self.tokenizers)


def texts(count: int) -> list[str]:
    if DATA.is_file():
        lines = DATA.read_text(encoding="utf-8").splitlines()[:count]
        return [f"{row['question']}\n{row['answer']}" for row in map(json.loads, lines)]
    problems = make_problems(count, seed=0, split="train")
    return ["\n".join(message["content"] for message in row["messages"]) for row in problems]


def tokenizers(found: list[str]) -> dict[str, PreTrainedTokenizerFast]:
    """Two trained on the texts, those of a model and of mistral-common where they are, and bytes."""
    made = {f"byte-level BPE {VOCABULARY}": trained_bpe(found), f"Unigram {VOCABULARY}": trained_unigram(found)}
    if MODEL.is_dir():
        made["gsm8k-lm"] = AutoTokenizer.from_pretrained(MODEL)
    made["bytes"] = byte_tokenizer(next(reversed(made.values())))
    try:
        import mistral_common
        from transformers.integrations.mistral import convert_tekken_tokenizer
    except ImportError:
        return made
    shipped = Path(mistral_common.__file__).parent / "data"
    made["Tekken"] = convert_tekken_tokenizer(str(shipped / "tekken_240911.json"))
    with TemporaryDirectory() as folder:
        shutil.copy(shipped / "mistral_instruct_tokenizer_240323.model.v3", Path(folder) / "tokenizer.model")
        made["SentencePiece 32k"] = LlamaTokenizer.from_pretrained(folder)
    return made


def trained_bpe(found: list[str]) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(found, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def trained_unigram(found: list[str]) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=VOCABULARY, unk_token="<unk>", special_tokens=["<unk>"], show_progress=False)
    tokenizer.train_from_iterator(found, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")


def pair_of(name: str, both: tuple[PreTrainedTokenizerFast, PreTrainedTokenizerFast], found: list[str]) -> Pair:
    kept, sides = [], []
    for text in found:
        try:
            sides.append([byte_spans(tokenizer, text) for tokenizer in both])
        except LossyTokenizationError:
            continue
        kept.append(text)
    ids, spans = (tuple([side[i][part] for side in sides] for i in range(2)) for part in range(2))
    return Pair(name=name, tokenizers=both, texts=kept, ids=ids, spans=spans)


def by_bytes(a: Sequence[int], b: Sequence[int]) -> list[tuple[int, int]]:
    """Places after the last tokens of each chunk: of ends in bytes, those that both sides have, found by counting to each."""
    found, i, j = [], 0, 0
    for byte in range(1, max([*a, *b]) + 1):
        i, j = (next((k for k in range(at, len(ends)) if ends[k] > byte), len(ends)) for at, ends in ((i, a), (j, b)))
        if byte in a[max(i - 1, 0) : i] and byte in b[max(j - 1, 0) : j]:
            found.append((i, j))
    return found


def check(pair: Pair) -> None:
    """Chunks are those found another way; TRL's groups are the same where it can tell."""
    groups = trl_alignment() if pair.byte_level else None
    for a, b in zip(*pair.spans, strict=True):
        found = chunks(a, b)
        assert [tuple(row) for row in found[:, 1::2].tolist()] == by_bytes(a[:, 1].tolist(), b[:, 1].tolist()), pair.name
        if groups is not None:
            theirs = zip(*groups(a.tolist(), b.tolist()), strict=True)
            assert [(s[0], s[-1] + 1, t[0], t[-1] + 1) for s, t in theirs] == [tuple(row) for row in found.tolist()], pair.name


def trl_alignment() -> Callable[..., Any]:
    from trl.experimental.gold.gold_trainer import ULDLoss

    return ULDLoss._align_by_byte_offsets


def at_once(pair: Pair) -> Callable[[], Any]:
    """The texts laid end to end, ``AT_ONCE`` at a time, from the lengths of their tokens."""
    lengths = [[spans[:, 1] - spans[:, 0] for spans in side] for side in pair.spans]
    places = [slice(start, start + AT_ONCE) for start in range(0, len(pair.texts), AT_ONCE)]
    return lambda: [chunks(*(end_to_end(np.concatenate(side[place])) for side in lengths)) for place in places]


def ours(pair: Pair) -> dict[str, Callable[[], Any]]:
    def side(one: Callable[..., Any]) -> Callable[[], Any]:
        return lambda: [one(tokenizer, text) for tokenizer in pair.tokenizers for text in pair.texts]

    def known() -> list[Spans]:
        sides = zip(pair.tokenizers, pair.ids, strict=True)
        return [spans_in_text(tokenizer, *case) for tokenizer, ids in sides for case in zip(pair.texts, ids, strict=True)]

    def whole() -> list[Any]:
        first, second = pair.tokenizers
        return [chunks(byte_spans(first, text)[1], byte_spans(second, text)[1]) for text in pair.texts]

    return {
        "tokenising": side(lambda tokenizer, text: tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]),
        "spans": known,
        "alignment": lambda: [chunks(a, b) for a, b in zip(*pair.spans, strict=True)],
        "alignment at once": at_once(pair),
        "all": whole,
    }


def theirs(pair: Pair) -> dict[str, Callable[[], Any]]:
    from trl.experimental.utils import encode_with_byte_offsets

    align, backends = trl_alignment(), [tokenizer.backend_tokenizer for tokenizer in pair.tokenizers]
    lists = [[spans.tolist() for spans in side] for side in pair.spans]

    def whole() -> list[Any]:
        a, b = (encode_with_byte_offsets(backend, pair.texts) for backend in backends)
        return [align(s, t) for (_, s), (_, t) in zip(a, b, strict=True)]

    return {
        "TRL tokenising": lambda: [backend.encode_batch(pair.texts, add_special_tokens=False) for backend in backends],
        "TRL alignment": lambda: [align(s, t) for s, t in zip(*lists, strict=True)],
        "TRL all": whole,
    }


def measured(pair: Pair, *, rounds: int) -> dict[str, list[float]]:
    """CPU seconds of each method in each round, without passes of the garbage collector: they are not the methods' own."""
    gc.collect()
    gc.disable()
    methods = ours(pair) | (theirs(pair) if pair.byte_level else {})
    found: dict[str, list[float]] = {name: [] for name in methods}
    for number in range(rounds + 1):
        for name, method in methods.items():
            begin = process_time()
            method()
            if number:  # the first is not counted
                found[name].append(process_time() - begin)
    gc.enable()
    return found


def speed(pair: Pair, seconds: float) -> str:
    return f"{pair.tokens / seconds / 1e6:.3g}"


def row(pair: Pair, found: dict[str, list[float]]) -> list[str]:
    names = ("tokenising", "spans", "alignment", "alignment at once", "all")
    sizes = [str(len(pair.texts)), " + ".join(f"{sum(map(len, side)) / len(side):.0f}" for side in pair.ids)]
    return [pair.name, *sizes, *(speed(pair, median(found[name])) for name in names)]


def against_trl(pair: Pair, found: dict[str, list[float]]) -> list[list[str]]:
    """Ratios of three kinds: alignment of given spans, spans with it but without tokenising, all."""
    seconds = {name: np.array(rounds) for name, rounds in found.items()}
    beyond = seconds["TRL all"] - seconds["TRL tokenising"]
    compared = {
        "alignment, text by text": (seconds["alignment"], seconds["TRL alignment"]),
        f"alignment, {AT_ONCE} texts at once": (seconds["alignment at once"], seconds["TRL alignment"]),
        "spans and alignment, text by text": (seconds["spans"] + seconds["alignment"], beyond),
        f"spans and alignment, {AT_ONCE} texts at once": (seconds["spans"] + seconds["alignment at once"], beyond),
        "all, with tokenising": (seconds["all"], seconds["TRL all"]),
    }
    rows = []
    for name, (mine, peer) in compared.items():
        ratio = peer / mine
        speeds = (speed(pair, float(np.median(times))) for times in (mine, peer))
        rows.append([pair.name, name, *speeds, f"{np.median(ratio):.1f}", f"{ratio.min():.1f} to {ratio.max():.1f}"])
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--texts", type=int, default=400)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--quick", action="store_true", help="few texts and rounds, to see that the script works")
    parser.add_argument("--output", help="the Markdown page to write")
    arguments = parser.parse_args()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # times are those of one core
    warnings.filterwarnings("ignore", category=UserWarning)  # TRL's about its experimental parts
    count, rounds = (24, 2) if arguments.quick else (arguments.texts, arguments.rounds)
    corpus = texts(count)
    made, console = tokenizers(corpus), Console()
    names = [
        (f"byte-level BPE {VOCABULARY}", f"Unigram {VOCABULARY}"),
        ("gsm8k-lm", "bytes"),
        ("gsm8k-lm", "Tekken"),
        ("Tekken", "SentencePiece 32k"),
    ]
    rows, trl_rows = [], []
    for first, second in names:
        if not {first, second} <= made.keys():
            console.print(f"left out: {first} | {second}, which are not on this machine")
            continue
        pair = pair_of(f"{first} / {second}", (made[first], made[second]), corpus)
        check(pair)
        found = measured(pair, rounds=rounds)
        rows.append(row(pair, found))
        trl_rows += against_trl(pair, found) if pair.byte_level else []
        console.print(*rows[-1], sep=" | ")
    parts = page(rows, trl_rows, source="GSM8K" if DATA.is_file() else "made word problems", rounds=rounds)
    for part in parts:
        print(part, end="\n\n")
    if arguments.output:
        write_results(arguments.output, title="Byte spans and the alignment of two tokenisations", parts=parts)


def page(rows: list[list[str]], trl_rows: list[list[str]], *, source: str, rounds: int) -> list[str]:
    return [
        f"Text: {source}, a question and its answer. Million tokens a second of one core, the tokens of both sides counted: "
        f"CPU seconds of one thread without garbage collection, medians of {rounds} rounds. Texts: those "
        "that both tokenizers leave as they are.",
        "Tokenising alone is the tokenizer's call; spans are those of known tokens (`spans_in_text`), both sides; alignment is "
        f"`chunks` of known spans, text by text or {AT_ONCE} texts laid end to end; all is `byte_spans` of both sides and "
        "`chunks`, tokenising included.",
        markdown_table(HEAD, rows),
        "TRL's GOLD, in the same rounds, where it supports the pair: `_align_by_byte_offsets`, and with it "
        "`encode_with_byte_offsets`, less the time of tokenising (its backend's `encode_batch`) or with it. The chunks of both "
        "are the same, and those that counting bytes gives.",
        markdown_table(TRL_HEAD, trl_rows),
    ]


if __name__ == "__main__":
    main()
