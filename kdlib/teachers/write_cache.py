"""A teacher's truncated log-probs for a prepared dataset, written to disk once."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch
import xxhash
from datasets import Dataset
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from kdlib.data.cache import Block, CacheIndex, CacheMeta, CacheWriter, Signals
from kdlib.data.collate import DistillationCollator
from kdlib.data.positions import causal_positions
from kdlib.kernels.outcomes import top_k
from kdlib.keys import draw_key
from kdlib.serving.errors import BadRowsError
from kdlib.teachers.vllm import VLLMTeacher
from kdlib.tokenizers.identity import Tool, template_fingerprint, tokenizer_fingerprint
from kdlib.types import LogProbs, Support, Teacher, TeacherSignal

_CHUNK_ELEMENTS = 2**25  # logits made at once: 128 MiB, and a few times that while they are ranked

Row = dict[str, Any]
Keep = Callable[[LogProbs, slice], LogProbs]  # what is kept of all log-probs of the positions of a slice
_GIVES = {"topk": Support.TOPK, "sampled": Support.SAMPLED_TEACHER, "given": Support.SAMPLED_STUDENT}


def write_cache(
    teacher: Teacher,
    dataset: Dataset,
    *,
    directory: str | Path,
    tokenizer: PreTrainedTokenizerBase,
    teacher_name: str,
    k: int = 64,
    kind: str = "topk",
    bits: int = 16,
    temperature: float = 1.0,
    batch_size: int = 8,
    rows_per_shard: int = 1024,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    tools: Sequence[Tool] | None = None,
    seed: int = 0,
    device: str | torch.device = "cpu",
) -> CacheIndex:
    """Write the teacher's signals at all scored positions of the prepared ``dataset``, packed or not.

    kind: ``topk`` keeps the k likeliest tokens and the log of the mass outside; ``sampled`` keeps k tokens
    drawn with replacement from p at ``temperature`` by a generator keyed by (seed, sample_id); ``given`` keeps log p of the
    token that follows in the row, whatever k says.
    bits: 32, 16 or 8 per log-prob. device: where batches and their rows go; the teacher's own, for speed.
    The same call again continues an interrupted writing. Samples for which a served teacher has no usable answer are left
    out. Raises ValueError when ``directory`` holds another cache, when the teacher gives less than is to be kept, or for values
    that make no cache.
    """
    k = 1 if kind == "given" else k
    _check_teacher(teacher, kind=kind, k=k, temperature=temperature)
    if isinstance(teacher, VLLMTeacher):
        teacher.check(tokenizer, len(tokenizer))
    meta = CacheMeta(
        kind=kind,
        k=k,
        vocab_size=len(tokenizer),
        logp_bits=bits,
        temperature=temperature,
        teacher=teacher_name,
        tokenizer=tokenizer_fingerprint(tokenizer),
        template=template_fingerprint(tokenizer, chat_template_kwargs=chat_template_kwargs, tools=tools),
        dataset=dataset_fingerprint(dataset),
        dataset_size=len(dataset),
        rows_per_shard=rows_per_shard,
        seed=seed if kind == "sampled" else None,
    )
    writer = CacheWriter(directory, meta)
    _write_missing(writer, teacher, dataset, batch_size=batch_size, device=device)
    return writer.index


def _check_teacher(teacher: Teacher, *, kind: str, k: int, temperature: float) -> None:
    """ValueError unless the teacher gives whole distributions, or is served and gives what is kept: at least the top k, or the
    given tokens.
    """
    if Support.FULL in teacher.provides:
        return
    if not isinstance(teacher, VLLMTeacher) or _GIVES.get(kind) is not teacher.provides:
        raise ValueError(
            f"a cache of kind {kind} needs whole distributions, this teacher gives {teacher.provides}: use a model"
            + (", or a server with signal sampled" if kind == "given" else "")
        )
    if kind == "topk" and k > teacher.k:
        raise ValueError(f"the top {k} are to be kept, the served teacher gives {teacher.k}: lower k, or raise the teacher's")
    if temperature != teacher.temperature:
        raise ValueError(
            f"the served teacher gives log-probs at temperature {teacher.temperature}, {temperature} is asked for: "
            "cache at the teacher's temperature, or serve hidden states, which do for every temperature"
        )


def _write_missing(
    writer: CacheWriter, teacher: Teacher, dataset: Dataset, *, batch_size: int, device: str | torch.device
) -> None:
    """Every shard that is not on disk yet, with a bar of rows that shows scored tokens per second."""
    start, tokens = perf_counter(), 0
    done = sum(shard.dataset_rows for shard in writer.index.shards)
    with tqdm(total=len(dataset), initial=done, desc="Caching", unit="row") as bar:
        for shard in writer.missing:
            blocks = []
            for rows in _batches(dataset.select(writer.rows(shard)).to_list(), batch_size=batch_size):
                block = _block(teacher, rows, meta=writer.meta, device=device)
                if block is not None:
                    blocks.append(block)
                    tokens += len(block.signals)
                bar.set_postfix_str(f"{tokens / (perf_counter() - start):,.0f} tokens/s", refresh=False)
                bar.update(len(rows))
            if not blocks:
                raise ValueError(f"the teacher gives nothing usable for any row of shard {shard}: look at the warnings above")
            writer.write(shard, blocks)


def dataset_fingerprint(dataset: Dataset) -> str:
    """xxhash128 of the sample ids in order; they name the content of their rows."""
    digest, packed = xxhash.xxh3_128(), "seq_lengths" in dataset.column_names
    for table in dataset.select_columns("sample_id").with_format("arrow").iter(batch_size=65536):
        ids = table["sample_id"].to_numpy()
        digest.update((np.concatenate(ids) if packed else ids).astype("<i8").tobytes())
    return digest.hexdigest()


def _batches(rows: list[Row], *, batch_size: int) -> list[list[Row]]:
    """The longest rows together: less padding, and where a row lies in its shard does not matter."""
    ordered = sorted(rows, key=lambda row: len(row["input_ids"]), reverse=True)
    return [ordered[start : start + batch_size] for start in range(0, len(ordered), batch_size)]


@torch.no_grad()
def _block(teacher: Teacher, rows: list[Row], *, meta: CacheMeta, device: str | torch.device) -> Block | None:
    """What is kept of the teacher's signal for one batch of rows; None when it has none for any of them."""
    collate = DistillationCollator(pad_token_id=0)  # any id will do, as nothing looks at padding
    batch = {name: x.to(device) if isinstance(x, Tensor) else x for name, x in collate(rows).items()}
    positions, sample_id = causal_positions(batch), batch["sample_id"].cpu()
    count = torch.bincount(positions.sequence.cpu(), minlength=len(sample_id))
    bad: list[int] = []
    try:
        signal: TeacherSignal | None = teacher.signal(batch, positions)
    except BadRowsError as error:
        signal, bad = error.signal, error.samples
    if signal is None:
        return None
    usable = ~torch.isin(sample_id, torch.tensor(bad, dtype=torch.long))
    labels = positions.labels[usable.to(positions.sequence.device)[positions.sequence]]
    sample_id, count = sample_id[usable], count[usable]
    if meta.kind == "topk":
        keep: Keep = partial(_keep_top, k=meta.k)
    elif meta.kind == "given":
        keep = partial(_keep_given, labels=labels)
    else:
        assert meta.seed is not None
        uniform = _uniform(sample_id.tolist(), count.tolist(), draws=meta.k, seed=meta.seed)
        keep = partial(_keep_drawn, uniform=uniform.to(positions.index.device))
    signals = _kept(signal.sliced(meta.vocab_size), keep, meta=meta)
    return Block(sample_id=sample_id.numpy(), count=count.numpy(), signals=signals)


def _kept(signal: TeacherSignal, keep: Keep, *, meta: CacheMeta) -> Signals:
    """``keep`` over chunks of rows, so that [N, V] never exists."""
    rows = max(1, _CHUNK_ELEMENTS // meta.vocab_size)
    chunks = [slice(start, min(start + rows, len(signal))) for start in range(0, len(signal), rows)]
    return Signals.joined([_on_host(keep(signal.at(chunk, meta.temperature), chunk)) for chunk in chunks])


def _on_host(p: LogProbs) -> Signals:
    assert p.ids is not None
    rest = p.rest.cpu().numpy() if p.support is Support.TOPK else None
    return Signals(ids=p.ids.int().cpu().numpy(), logp=p.logp.cpu().numpy(), rest=rest)


def _keep_top(p: LogProbs, chunk: slice, *, k: int) -> LogProbs:
    return top_k(p, k)


def _keep_given(p: LogProbs, chunk: slice, *, labels: Tensor) -> LogProbs:
    """log p of the ``labels`` [N]; a served teacher's signal is that already."""
    if p.support is Support.SAMPLED_STUDENT:
        return p
    ids = labels[chunk, None]
    return LogProbs(logp=p.logp.gather(-1, ids), ids=ids, rest=p.rest, support=Support.SAMPLED_STUDENT)


def _keep_drawn(p: LogProbs, chunk: slice, *, uniform: Tensor) -> LogProbs:
    """Ids drawn by inverting the cumulative distribution at ``uniform`` [N, draws]: the same in any batch."""
    cumulative = p.logp.double().exp().cumsum(-1)
    wanted = uniform[chunk] * cumulative[:, -1:]
    ids = torch.searchsorted(cumulative, wanted, right=True).clamp(max=p.logp.shape[-1] - 1)
    return LogProbs(logp=p.logp.gather(-1, ids), ids=ids, rest=p.rest, support=Support.SAMPLED_TEACHER)


def _uniform(sample_ids: list[int], counts: list[int], *, draws: int, seed: int) -> Tensor:
    """Uniform numbers [sum of counts, draws]; a sequence's depend on (seed, sample_id) alone."""
    drawn = []
    for sample_id, count in zip(sample_ids, counts, strict=True):
        generator = torch.Generator().manual_seed(draw_key(seed, sample_id))
        drawn.append(torch.rand(count, draws, generator=generator, dtype=torch.float64))
    return torch.cat(drawn)
