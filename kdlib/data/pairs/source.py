"""Where pairs come from: a directory of ``kdlib generate``, its lines, or rows with ``prompt``, ``chosen`` and ``rejected``."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from datasets import Dataset, concatenate_datasets

from kdlib.data.load import load_rows
from kdlib.data.traces import TraceIndex
from kdlib.tokenizers.identity import tokenizer_fingerprint

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

COLUMNS = {"prompt", "chosen", "rejected"}
TRACES = {"prompt_id", "correct", "finish", "prompt", "completion", "input_ids", "labels", "tokenizer"}
ONLY_RIGHT, ONLY_WRONG = "a prompt with right answers alone", "a prompt with wrong answers alone"
NOT_JUDGED, CUT = "an answer without a verdict", "an answer that was cut, in another tokenizer's tokens"


@dataclass(frozen=True, kw_only=True)
class Link:
    """A pair: which answer is the right one, which the wrong one if there is one, and the row with its other columns."""

    right: int
    wrong: int | None
    row: int


@dataclass(frozen=True, kw_only=True)
class Answers:
    """``rows``: single answers, for ``prepare_dataset``; ``links``: the pairs of them; ``left_out``: how many, by reason."""

    rows: Dataset
    links: list[Link]
    left_out: Counter[str]


def load_pairs(dataset_name: str, *, split: str = "train", config: str | None = None) -> Dataset:
    """The rows of ``dataset_name``; of a directory of ``kdlib generate`` its judged completions, right ones first.

    Raises ValueError for a directory that is unfinished or altered, or whose completions nothing has judged.
    """
    directory = Path(dataset_name).expanduser()
    if not (directory.is_dir() and any(directory.glob("shard-*.jsonl*"))):
        return load_rows(dataset_name, split=split, config=config)
    TraceIndex.load(directory).check(directory)
    files = [directory / name for name in ("correct.jsonl", "incorrect.jsonl")]
    filled = [path for path in files if path.is_file() and path.stat().st_size]
    if not filled:
        raise ValueError(f"{directory} has no completion with a verdict: run kdlib generate with --verify, to its end")
    return concatenate_datasets([load_rows(str(path), split=split) for path in filled])


def answers(rows: Dataset, tokenizer: PreTrainedTokenizerBase, *, max_pairs: int) -> Answers:
    """The pairs of ``rows``, at most ``max_pairs`` of a prompt; ValueError for columns that hold none."""
    columns = set(rows.column_names)
    if columns >= TRACES:
        return _of_traces(rows, tokenizer, max_pairs=max_pairs)
    if columns >= COLUMNS:
        return _of_rows(rows)
    raise ValueError(
        f"the dataset has the columns {', '.join(sorted(columns))}: pairs are a directory of kdlib generate --verify, or rows "
        "with prompt, chosen and rejected (trl.extract_prompt makes the prompt of conversations)"
    )


def _of_rows(rows: Dataset) -> Answers:
    """Row i is a pair; a ``rejected`` of null is none."""
    present = [i for i, rejected in enumerate(rows["rejected"][:]) if rejected]
    wrong = {i: len(rows) + place for place, i in enumerate(present)}
    sides = [
        side.select_columns(["prompt", name]).rename_column(name, "completion")
        for name, side in (("chosen", rows), ("rejected", rows.select(present)))
    ]
    links = [Link(right=i, wrong=wrong.get(i), row=i) for i in range(len(rows))]
    return Answers(rows=concatenate_datasets(sides), links=links, left_out=Counter({ONLY_RIGHT: len(rows) - len(present)}))


def _of_traces(rows: Dataset, tokenizer: PreTrainedTokenizerBase, *, max_pairs: int) -> Answers:
    """The tokens that were drawn; their text where another tokenizer drew them, without completions that were cut."""
    same = rows["tokenizer"][0] == tokenizer_fingerprint(tokenizer)
    cut = [finish == "length" and not same for finish in rows["finish"][:]]
    by_prompt: dict[int, dict[bool, list[int]]] = defaultdict(lambda: {True: [], False: []})
    left_out: Counter[str] = Counter()
    for index, (prompt, verdict) in enumerate(zip(rows["prompt_id"][:], rows["correct"][:], strict=True)):
        if verdict is None:
            left_out[NOT_JUDGED] += 1
        elif cut[index]:
            left_out[CUT] += 1
        else:
            by_prompt[prompt][verdict].append(index)
    links: list[Link] = []
    for found in by_prompt.values():
        pairs = paired(found[True], found[False], max_pairs=max_pairs)
        links += [Link(right=right, wrong=wrong, row=right) for right, wrong in pairs]
        left_out += Counter({ONLY_RIGHT: not found[False], ONLY_WRONG: not found[True]})
    columns = ["input_ids", "labels"] if same else ["prompt", "completion"]
    return Answers(rows=rows.select_columns(columns), links=links, left_out=left_out)


def paired(right: Sequence[int], wrong: Sequence[int], *, max_pairs: int) -> list[tuple[int, int | None]]:
    """Up to ``max_pairs`` different pairs in which every answer stands about as often; of right answers alone (right, None)."""
    if not right:
        return []
    count = min(max_pairs, max(len(right), len(wrong)))
    return [(right[i % len(right)], wrong[i % len(wrong)] if wrong else None) for i in range(count)]
