"""Bytes per token and tokens per second of a teacher cache, beside a `datasets` table of nested lists.

    python benchmarks/cache.py [--tokens 50000] [--k 8 64] [--rounds 5]

Rows of about 100 tokens are read in batches of 32, in random order, with warm pages, on one thread: for the
cache into int32 ids and log-probs in numpy, for the table into torch tensors as `torch.tensor(row["ids"])`
makes them.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from time import perf_counter

import numpy as np
import torch
from datasets import Dataset
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from kdlib.data.cache import Block, CacheMeta, CacheReader, CacheWriter, Signals

VOCAB_SIZES = (65536, 151936, 300000)
ROW_TOKENS = 100
BATCH = 32
TABLE_TOKENS = 2000  # the table is slow, and its speed does not depend on its size


def synthetic(tokens: int, *, k: int, vocab_size: int) -> tuple[NDArray, Signals]:
    """(count [r], signals [tokens]): Zipf-like log-probs of random temperature and distinct random ids."""
    rng = np.random.default_rng(0)
    sharpness = rng.uniform(0.8, 2.5, (tokens, 1))
    logits = -sharpness * np.log(np.arange(1, 4 * k + 1)) + rng.normal(0, 0.1, (tokens, 4 * k))
    logp = np.sort(logits - np.log(np.exp(logits).sum(-1, keepdims=True)))[:, ::-1]
    rest = np.log(np.exp(logp[:, k:]).sum(-1))
    ids = (rng.integers(0, vocab_size, (tokens, 1)) + np.arange(k) * (vocab_size // k)) % vocab_size
    count = rng.integers(ROW_TOKENS // 2, 3 * ROW_TOKENS // 2, 2 * tokens // ROW_TOKENS)
    count = count[: np.searchsorted(count.cumsum(), tokens)]
    count[-1] += tokens - count.sum()
    logp, rest = logp[:, :k].astype(np.float32), rest.astype(np.float32)
    return count, Signals(ids=ids.astype(np.int32), logp=logp, rest=rest)


def write(directory: Path, count: NDArray, signals: Signals, *, vocab_size: int, bits: int) -> CacheReader:
    """One cache of all sequences, sample ids 0, 1, ..."""
    sample_id = np.arange(len(count))
    meta = CacheMeta(
        kind="topk",
        k=signals.ids.shape[1],
        vocab_size=vocab_size,
        logp_bits=bits,
        temperature=1.0,
        teacher="synthetic",
        tokenizer="",
        template="",
        dataset="",
        dataset_size=len(count),
        rows_per_shard=len(count),
    )
    CacheWriter(directory, meta).write(0, [Block(sample_id=sample_id, count=count, signals=signals)])
    return CacheReader(directory)


def read_cache(reader: CacheReader, sample_id: NDArray) -> Signals:
    start, count = reader.locate(sample_id)
    within = np.arange(count.sum()) - np.repeat(np.cumsum(count) - count, count)
    return reader.read(np.repeat(start, count) + within)


def nested_table(count: NDArray, signals: Signals) -> Dataset:
    """The same as a dataset with one list of lists per sequence."""
    bounds = np.cumsum(count)[:-1]
    columns = {"ids": np.split(signals.ids, bounds), "logp": np.split(signals.logp, bounds)}
    return Dataset.from_dict({name: [row.tolist() for row in rows] for name, rows in columns.items()})


def speed(read: Callable[[NDArray], object], count: NDArray, *, rounds: int) -> float:
    """Tokens per second (wall clock), the best of some rounds over all rows in random order."""
    order = np.random.default_rng(1).permutation(len(count))
    seconds = []
    for _ in range(rounds):
        begin = perf_counter()
        for at in range(0, len(order), BATCH):
            read(order[at : at + BATCH])
        seconds.append(perf_counter() - begin)
    return int(count.sum()) / min(seconds)


def table_speed(count: NDArray, signals: Signals) -> float:
    few = count[: np.searchsorted(count.cumsum(), TABLE_TOKENS)]
    table = nested_table(few, signals_of(signals, few.sum()))

    def read(rows: NDArray) -> object:
        return [(torch.tensor(row["ids"]), torch.tensor(row["logp"])) for row in (table[int(i)] for i in rows)]

    return speed(read, few, rounds=2)


def signals_of(signals: Signals, tokens: int) -> Signals:
    return Signals(ids=signals.ids[:tokens], logp=signals.logp[:tokens])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=50000)
    parser.add_argument("--k", type=int, nargs="+", default=[8, 64])
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(1)
    heads = ("k", "vocabulary", "bits", "bytes/token", "tokens/s", "x lists", "max error", "mean error")
    table = Table(*heads, title="Teacher cache; errors of log-probs in nats")
    for k in args.k:
        for vocab_size in VOCAB_SIZES:
            count, signals = synthetic(args.tokens, k=k, vocab_size=vocab_size)
            nested = table_speed(count, signals)
            for bits in (16, 8):
                with tempfile.TemporaryDirectory() as folder:
                    reader = write(Path(folder), count, signals, vocab_size=vocab_size, bits=bits)
                    ours = speed(partial(read_cache, reader), count, rounds=args.rounds)
                    summary = reader.index.summary
                table.add_row(
                    str(k),
                    str(vocab_size),
                    str(bits),
                    f"{summary['bytes_per_token']:.2f}",
                    f"{ours:,.0f}",
                    f"{ours / nested:,.0f}",
                    f"{summary['error_max']:.4f}",
                    f"{summary['error_mean']:.4f}",
                )
    Console().print(table)


if __name__ == "__main__":
    main()
