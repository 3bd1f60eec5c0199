"""How likely models make the target and control texts of probes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from datasets import Dataset

from kdlib.data.traces.prompts import asked
from kdlib.decoding.sampling import context_length
from kdlib.eval.acceptance_statistics import Array
from kdlib.eval.audit_probes import Probe, Probes
from kdlib.eval.audit_statistics import TEXT, Candidate, text_shift
from kdlib.eval.row_sums import row_nats

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TextScores = Mapping[tuple[int, str], float]  # (row of the probe, text) -> log p, nats


def text_scores(
    model: Any, probes: Probes, prompts: Sequence[list[int]], *, tokenizer: PreTrainedTokenizerBase, batch_size: int
) -> TextScores:
    """log p(text | prompt) of every target and control, its end not counted; ``prompts``: the token ids of every row's."""
    asked = list(dict.fromkeys((probe.row, text) for probe in _every(probes) for text in (*probe.targets, *probe.controls)))
    if not asked:
        return {}
    rows = Dataset.from_list([_row(prompts[row], text, tokenizer) for row, text in asked])
    longest, context = max(len(ids) for ids in rows["input_ids"][:]), context_length(model)
    if longest > context:
        raise ValueError(f"a probe with its text has {longest} tokens, the model reads {context}: shorten it")
    nats = row_nats(model, rows, tokenizer=tokenizer, batch_size=batch_size).of
    return {key: -float(value) for key, value in zip(asked, nats, strict=True)}


def asked_rows(probes: Probes, tokenizer: PreTrainedTokenizerBase, *, apply_chat_template: bool | None) -> Dataset:
    """Every probe's prompt as a row to prepare; a text becomes a user turn where the tokenizer has a template, or as asked."""
    wrap = tokenizer.chat_template is not None if apply_chat_template is None else apply_chat_template
    return Dataset.from_list([{"prompt": asked(row, wrap=wrap)} for row in probes.prompts])


def text_candidates(probes: Probes, *, student: TextScores, teacher: TextScores, baseline: TextScores) -> list[Candidate]:
    """Both models' shifts of every behaviour that has targets."""
    return [
        Candidate(
            name=name,
            kind=TEXT,
            probes=len(members),
            student=text_shift(*_shifts(members, student, baseline)),
            teacher=text_shift(*_shifts(members, teacher, baseline)),
        )
        for name, members in probes.targeted.items()
    ]


def _shifts(probes: Sequence[Probe], model: TextScores, baseline: TextScores) -> tuple[Array, Array]:
    """Targets [probes] and controls [probes, C]: log p of the model minus that of the baseline."""
    targets = [_any(probe, model) - _any(probe, baseline) for probe in probes]
    controls = [[model[probe.row, text] - baseline[probe.row, text] for text in probe.controls] for probe in probes]
    return np.array(targets), np.array(controls).reshape(len(probes), -1)


def _any(probe: Probe, scores: TextScores) -> float:
    """log of the chance of one of the targets."""
    return float(np.logaddexp.reduce([scores[probe.row, text] for text in probe.targets]))


def _every(probes: Probes) -> Iterator[Probe]:
    for members in probes.targeted.values():
        yield from members


def _row(prompt: list[int], text: str, tokenizer: PreTrainedTokenizerBase) -> dict[str, list[int]]:
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    if not ids:
        raise ValueError(f"the text {text!r} of a probe has no tokens: leave it out")
    return {"input_ids": [*prompt, *ids], "labels": [-100] * len(prompt) + list(ids)}
