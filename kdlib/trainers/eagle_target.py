"""The target as an EAGLE-3 head needs it: its configuration, embeddings and head, and hidden states for each batch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from kdlib.data.features import FeatureReader
from kdlib.head import Head
from kdlib.models import inner, load_tokenizer
from kdlib.teachers import HFTeacher, resolve_teacher
from kdlib.trainers.eagle_config import EagleConfig
from kdlib.types import Positions, Support, Teacher, TeacherSignal


class StoredFeatures:
    """A Teacher that reads what ``kdlib.data.features`` has written: the target itself is not loaded."""

    provides = Support.FULL

    def __init__(self, directory: str) -> None:
        self.reader = FeatureReader(directory)
        self.vocab_size: int | None = None
        self._head = self.reader.target.head

    def signal(self, batch: Mapping[str, Any], positions: Positions, layers: tuple[int, ...] = ()) -> TeacherSignal:
        """As HFTeacher's, of right-padded rows; ValueError for rows that were not written, or with other tokens."""
        if not set(layers) <= set(self.reader.meta.layers):
            raise ValueError(f"{self.reader.directory} holds layers {self.reader.meta.layers}, the head reads {layers}")
        device, S = positions.index.device, batch["input_ids"].shape[1]
        lengths = batch["attention_mask"].sum(-1).tolist()
        pairs = zip(batch["sample_id"].tolist(), batch["input_ids"].cpu(), lengths, strict=True)
        read = [self.reader.read(sample, ids[:length]) for sample, ids, length in pairs]
        last, features = (_padded([x[i] for x in read], S).to(device) for i in (1, 0))
        self._head = self._head.to(device)
        head = self._head if self.vocab_size is None else self._head.sliced(self.vocab_size)
        places = {layer: features[:, :, i] for i, layer in enumerate(self.reader.meta.layers)}
        rows = last.flatten(0, 1).index_select(0, positions.index)
        return TeacherSignal(hidden=rows, head=head, features={layer: places[layer] for layer in layers})


def _padded(rows: list[Tensor], width: int) -> Tensor:
    padded = pad_sequence(rows, batch_first=True)
    return torch.nn.functional.pad(padded, [0, 0] * (padded.ndim - 2) + [0, width - padded.shape[1]])


@dataclass(frozen=True, kw_only=True)
class EagleTarget:
    """``teacher`` gives features and last hidden states; the rest is what a head is made from."""

    teacher: HFTeacher | StoredFeatures
    name: str
    config: PretrainedConfig
    embeddings: Tensor
    head: Head
    tokenizer: PreTrainedTokenizerBase | None

    @staticmethod
    def of(teacher: Any, args: EagleConfig) -> EagleTarget:
        """From what users give as ``teacher``, or from ``features_dir``; ValueError for teachers without hidden states."""
        if args.features_dir is not None:
            return _stored(args.features_dir, teacher)
        found: Teacher | None = resolve_teacher(teacher, args.teacher_options)
        if not isinstance(found, HFTeacher):
            raise ValueError(
                f"an EAGLE-3 head reads its target's hidden states: give the target's path or model, not {type(found).__name__}"
            )
        model = inner(found.model)
        embeddings = model.get_input_embeddings().weight.detach()
        return EagleTarget(
            teacher=found,
            name=found.name,
            config=model.config,
            embeddings=embeddings,
            head=Head.of(model),
            tokenizer=found.tokenizer,
        )


def _stored(directory: str, teacher: Any) -> EagleTarget:
    if teacher is not None and not isinstance(teacher, str):
        raise ValueError("features_dir holds the target's hidden states: leave teacher out, or give its name for the export")
    stored = StoredFeatures(directory)
    target, name = stored.reader.target, teacher or stored.reader.meta.target
    return EagleTarget(
        teacher=stored,
        name=name,
        config=target.config,
        embeddings=target.embeddings,
        head=target.head,
        tokenizer=load_tokenizer(directory) if stored.reader.has_tokenizer else None,
    )
