"""A stale engine stops the run; one that has the weights does not."""

from __future__ import annotations

import pytest
import torch

from kdlib.samplers import HFSampler, StaleEngineError, merged_weights, probe_sequences, verify_sync
from tests.tiny import tiny_llama

V = 96


def test_an_engine_with_the_students_weights_passes() -> None:
    student, engine = tiny_llama(V), HFSampler(tiny_llama(V, seed=1), pad_token_id=0, own_copy=True)
    probes = probe_sequences(V, seed=0)
    expected = HFSampler(student, pad_token_id=0).score(probes)
    with pytest.raises(StaleEngineError, match=r"differ from the student's by [\d.]+ nats .* still has old weights"):
        verify_sync(engine, expected, probes, tolerance=1e-2)
    engine.load(merged_weights(student))
    assert verify_sync(engine, expected, probes, tolerance=1e-2) < 1e-4


def test_a_single_stale_tensor_is_noticed() -> None:
    student = tiny_llama(V)
    engine = HFSampler(student, pad_token_id=0, own_copy=True)
    with torch.no_grad():
        student.model.layers[1].mlp.up_proj.weight.mul_(1.05)
    probes = probe_sequences(V, seed=0)
    with pytest.raises(StaleEngineError):
        verify_sync(engine, HFSampler(student, pad_token_id=0).score(probes), probes, tolerance=1e-2)


def test_nan_is_not_agreement() -> None:
    engine = HFSampler(tiny_llama(V), pad_token_id=0)
    expected = engine.score([[1, 2, 3]])
    expected[0][1] = float("nan")
    with pytest.raises(StaleEngineError, match="nan nats"):
        verify_sync(engine, expected, [[1, 2, 3]], tolerance=1e-2)


def test_probes_depend_on_the_seed_alone_and_stay_in_the_vocabulary() -> None:
    probes = probe_sequences(7, seed=5)
    assert probes == probe_sequences(7, seed=5) != probe_sequences(7, seed=6)
    assert all(0 <= token < 7 for row in probes for token in row) and all(len(row) >= 8 for row in probes)
