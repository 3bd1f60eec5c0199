"""A cache on disk as the teacher: training needs neither the teacher's weights nor its forward pass."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from datasets import Dataset
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from kdlib.data.cache import CacheReader
from kdlib.tokenizers.identity import Tool, template_fingerprint, tokenizer_fingerprint
from kdlib.types import Positions, Support, TeacherSignal

_PROVIDES = {"topk": Support.TOPK, "sampled": Support.SAMPLED_TEACHER, "given": Support.SAMPLED_STUDENT}


class CachedTeacher:
    """The log-probs that ``kdlib cache`` wrote to ``path``, looked up by the sample ids of a batch.

    tokenizer, chat_template_kwargs, tools: when a tokenizer is given, the cache must have been made with the
    same (``check``, which the trainer calls). verify: compare checksums when opening.
    ``provides`` is TOPK, SAMPLED_TEACHER (kind sampled) or SAMPLED_STUDENT (kind given: the row's own tokens, whoever wrote
    them); ``temperature`` is the one the signals were captured at, and the objective's must equal it.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        tokenizer: PreTrainedTokenizerBase | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        tools: Sequence[Tool] | None = None,
        verify: bool = True,
    ) -> None:
        self.reader = CacheReader(path, verify=verify)
        meta = self.reader.meta
        self.name, self.temperature = meta.teacher, meta.temperature
        self.provides = _PROVIDES[meta.kind]
        if tokenizer is not None:
            self.check(tokenizer, chat_template_kwargs=chat_template_kwargs, tools=tools)

    def check(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        tools: Sequence[Tool] | None = None,
    ) -> None:
        """Raises ValueError when the cache was written with another tokenizer, template, kwargs or tools."""
        self.reader.check_fingerprints(
            tokenizer=tokenizer_fingerprint(tokenizer),
            template=template_fingerprint(tokenizer, chat_template_kwargs=chat_template_kwargs, tools=tools),
        )

    def check_rows(self, dataset: Dataset, *, what: str) -> None:
        """Raises ValueError when a row of the prepared ``dataset`` is not in the cache; ``what`` names it in the message."""
        ids = pa.chunked_array(dataset.with_format("arrow")["sample_id"])
        flat = np.unique(ids.combine_chunks().flatten().to_numpy() if pa.types.is_list(ids.type) else ids.to_numpy())
        absent = len(flat) - self.reader.holds(flat).sum()
        if absent:
            raise ValueError(
                f"{absent} of {len(flat)} {what} rows are not in the cache {self.reader.directory}: it was written for "
                "another dataset, max_length or chat template; run `kdlib cache` for these rows"
                + (" too, or leave them out" if what != "training" else "")
            )

    def signal(self, batch: Mapping[str, Any], positions: Positions, layers: tuple[int, ...] = ()) -> TeacherSignal:
        """TeacherSignal(logp, ids, rest) of the rows, on the device of ``positions``.

        ``positions.sequence`` [N] points into ``batch["sample_id"]``; a sequence's rows are in the order of
        its tokens. Raises ValueError for samples that the cache does not hold with as many positions, and for
        ``layers``.
        """
        if layers:
            raise ValueError("a cache holds no hidden layers: this objective needs the teacher itself")
        sequence = positions.sequence.cpu().numpy()
        tokens = self._tokens(batch["sample_id"].cpu().numpy(), sequence)
        read, device = self.reader.read(tokens), positions.index.device
        return TeacherSignal(
            logp=torch.from_numpy(read.logp).to(device),
            ids=torch.from_numpy(read.ids).to(device).long(),
            rest=None if read.rest is None else torch.from_numpy(read.rest).to(device),
            support=self.provides,
            temperature=self.temperature,
        )

    def _tokens(self, sample_id: NDArray, sequence: NDArray) -> NDArray:
        """Where in the cache each position is [N]: its sequence's first token plus its rank in there."""
        start, cached = self.reader.locate(sample_id)
        counts = np.bincount(sequence, minlength=len(sample_id))
        differs = (counts != cached) & (counts > 0)  # a row that evaluation repeats to fill a batch has none scored
        if differs.any():
            raise ValueError(
                f"sample {sample_id[differs][0]} has {counts[differs][0]} scored positions in the batch and "
                f"{cached[differs][0]} in the cache {self.reader.directory}: score all of a sample's "
                "positions, or run `kdlib cache` with the same dataset, max_length and chat template"
            )
        order = np.argsort(sequence, kind="stable")
        first = np.cumsum(counts) - counts
        rank = np.empty_like(order)
        rank[order] = np.arange(len(order)) - first[sequence[order]]
        return start[sequence] + rank
