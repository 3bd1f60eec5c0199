"""Pairs -> token rows: the right answer's ``input_ids`` and ``labels``, and beside them the wrong one's."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from datasets import Dataset, concatenate_datasets

from kdlib.data.pairs.collate import ANSWER
from kdlib.data.pairs.source import ONLY_RIGHT, Link, answers
from kdlib.data.rows import Prepared, prepare_dataset

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger("kdlib")

Unpaired = Literal["drop", "positives"]
LOST = "an answer that was skipped"


def prepare_pairs(
    rows: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_pairs: int = 1,
    unpaired: Unpaired = "drop",
    columns: Sequence[str] = (),
    **options: Any,
) -> Prepared:
    """``rows`` (``load_pairs``) as token rows of pairs; ``options`` are those of ``prepare_dataset``.

    unpaired: a prompt with right answers alone is dropped, or its right answers are kept without a wrong one; one with wrong
    answers alone is dropped. ``columns`` of the rows are kept. What was dropped is counted in ``reasons``.
    Raises ValueError when no pair is left.
    """
    found = answers(rows, tokenizer, max_pairs=max_pairs)
    links = [link for link in found.links if link.wrong is not None or unpaired == "positives"]
    left_out = Counter({reason: n for reason, n in found.left_out.items() if unpaired == "drop" or reason != ONLY_RIGHT})
    _check_any(links, found.left_out)
    made, where = _single(found.rows, links, tokenizer, **options)
    kept = [link for link in links if link.right in where and (link.wrong is None or link.wrong in where)]
    left_out += Counter(made.reasons) + Counter({LOST: len(links) - len(kept)})  # adding drops what is 0
    _check_any(kept, left_out)
    if left_out:
        logger.warning("%s pairs; left out: %s", f"{len(kept):,}", _told(left_out))
    dataset = _beside_each_other(made.dataset.remove_columns("source"), kept, where)
    for name in columns:
        values = rows[name][:]
        dataset = dataset.add_column(name, [values[link.row] for link in kept])
    return Prepared(dataset=dataset, skipped=left_out.total(), reasons=dict(left_out), truncated=made.truncated)


def _check_any(links: Sequence[Link], left_out: Counter[str]) -> None:
    if not any(link.wrong is not None for link in links):
        raise ValueError(
            f"no prompt has a right and a wrong answer ({_told(+left_out) or 'there is none'}): draw more (kdlib generate "
            "--num_generations), or train on the right ones alone (--objective CrossEntropy)"
        )


def _told(left_out: Counter[str]) -> str:
    return ", ".join(f"{n:,} x {reason}" for reason, n in left_out.items())


def _single(
    rows: Dataset, links: Sequence[Link], tokenizer: PreTrainedTokenizerBase, **options: Any
) -> tuple[Prepared, dict[int, int]]:
    """The answers that pairs are made of, each prepared once, and where in them each of ``rows`` is."""
    used = sorted({index for link in links for index in (link.right, link.wrong) if index is not None})
    made = prepare_dataset(rows.select(used), tokenizer, keep_source=True, **options)
    sources = made.dataset["source"][:]
    if len(set(sources)) < len(sources):
        raise ValueError("an answer of several turns becomes several rows: let each answer of a pair be its last turn")
    return made, {used[source]: place for place, source in enumerate(sources)}


def _beside_each_other(single: Dataset, links: Sequence[Link], where: Mapping[int, int]) -> Dataset:
    """A row for each pair: the right answer's columns, and under ``rejected_`` those of the wrong one, empty for none."""
    none = Dataset.from_dict({"input_ids": [[]], "labels": [[]], "sample_id": [0]}, features=single.features)
    both = concatenate_datasets([single, none])
    right = both.select([where[link.right] for link in links])
    wrong = both.select([len(single) if link.wrong is None else where[link.wrong] for link in links])
    return concatenate_datasets([right, wrong.rename_columns({name: f"rejected_{name}" for name in ANSWER})], axis=1)
