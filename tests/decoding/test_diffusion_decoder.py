"""The decoder as others use it: batches, settings as data, strategies by name."""

from __future__ import annotations

import json

import pytest
import torch

from kdlib.decoding import DiffusionDecoder, diffusion_generate
from kdlib.decoding.diffusion_decoder import PRESETS, decoder_of
from kdlib.decoding.diffusion_step import Strategy
from kdlib.decoding.strategies import (
    STRATEGIES,
    CoherentContext,
    ConfidenceThreshold,
    EntropyThreshold,
    Factor,
    Guided,
    LowConfidence,
    MultiBlock,
    SlowFast,
    TopKMargin,
    strategy_json,
    strategy_of,
)
from tests.decoding.diffusion_models import SPECS, V, contextual, prompts
from tests.tiny import tiny_llama

ALL: list[Strategy] = [
    LowConfidence(steps=3),
    TopKMargin(steps=4),
    ConfidenceThreshold(threshold=0.8),
    EntropyThreshold(threshold=0.3),
    Factor(factor=1.5),
    CoherentContext(strategy=SlowFast(strategy=EntropyThreshold(threshold=0.2), tolerance=0.3), history=2),
    Guided(guide="some/path"),
    MultiBlock(threshold=0.4, add=0.2, activate=0.9, blocks=3),
    SlowFast(),
]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_decode_in_batches(temperature):
    model, rows = contextual(SPECS["full"]), prompts()
    decoder = DiffusionDecoder(gen_length=9, block_length=4, strategy=Factor(factor=1.2), temperature=temperature, seed=3)
    whole = singles(decoder, model, rows, size=8)
    for size in (1, 3):
        assert singles(decoder, model, rows, size=size) == whole
    assert sorted(whole) == list(range(8))


def singles(decoder: DiffusionDecoder, model: torch.nn.Module, rows: list[list[int]], *, size: int) -> dict[int, tuple]:
    found = {}
    for numbers, output in decoder.decode(model, rows, spec=SPECS["full"], batch_size=size):
        assert len(numbers) <= size
        for i, row in enumerate(numbers):
            found[row] = (output.sequences[i, -9:].tolist(), output.commit_step[i].tolist(), int(output.forwards[i]))
    return found


def test_decode_is_generate():
    model, prompt = contextual(SPECS["full"]), prompts()[0]
    decoder = DiffusionDecoder(gen_length=9, block_length=4, cache="prefix")
    ((rows, found),) = decoder.decode(model, [prompt], spec=SPECS["full"], batch_size=4, stop_ids=())
    expected = diffusion_generate(
        model,
        torch.tensor([prompt]),
        spec=SPECS["full"],
        gen_length=9,
        block_length=4,
        strategy=ConfidenceThreshold(threshold=0.9),
        cache="prefix",
        stop_ids=(),
    )
    assert rows == [0] and torch.equal(found.sequences, expected.sequences)


@pytest.mark.parametrize("strategy", ALL, ids=lambda strategy: type(strategy).__name__)
def test_strategies_as_data(strategy):
    content = json.loads(json.dumps(strategy_json(strategy)))
    assert list(content) == [type(strategy).__name__]
    assert strategy_of(content) == strategy


def test_every_strategy_is_known():
    assert {type(strategy) for strategy in ALL} == set(STRATEGIES.values())
    assert strategy_of("ConfidenceThreshold") == ConfidenceThreshold()
    assert strategy_of({"SlowFast": {"strategy": "EntropyThreshold"}}) == SlowFast(strategy=EntropyThreshold())


@pytest.mark.parametrize("name", PRESETS)
def test_decoders_as_data(name):
    decoder = PRESETS[name]
    decoder.check()
    assert DiffusionDecoder.from_json(json.loads(json.dumps(decoder.to_json()))) == decoder


def test_a_models_own_settings():
    model = contextual(SPECS["blocks"])
    assert decoder_of(model.config) == DiffusionDecoder(block_length=4)
    own = DiffusionDecoder(gen_length=12, block_length=4, strategy=MultiBlock(), cache="block")
    model.config.diffusion = {**model.config.diffusion, "decoding": own.to_json()}
    assert decoder_of(model.config) == own
    with pytest.raises(ValueError, match="no diffusion language model"):
        decoder_of(tiny_llama(V).config)


WRONG = {
    "name": ("Confidence", "no strategy Confidence: choose LowConfidence"),
    "option": ({"Factor": {"f": 1}}, "Factor has no option f: its options are factor"),
    "missing": ({"LowConfidence": {}}, "LowConfidence needs other options"),
    "two": ({"Factor": {}, "SlowFast": {}}, "a strategy is Name or"),
    "values": ({"Factor": 3}, "a strategy is Name or"),
    "range": ({"ConfidenceThreshold": {"threshold": 1.5}}, "threshold 1.5: choose a probability"),
    "entropy": ({"EntropyThreshold": {"threshold": -1}}, "threshold -1"),
    "factor": ({"Factor": {"factor": 0}}, "factor 0"),
    "steps": ({"TopKMargin": {"steps": 0}}, "steps 0"),
    "history": ({"CoherentContext": {"history": 0}}, "history 0"),
    "tolerance": ({"SlowFast": {"tolerance": 2}}, "tolerance 2"),
    "blocks": ({"MultiBlock": {"blocks": 0}}, "blocks 0"),
    "add": ({"MultiBlock": {"add": 0}}, "add 0"),
    "nested": ({"SlowFast": {"strategy": "MultiBlock"}}, "adds the next block itself"),
}


@pytest.mark.parametrize(("content", "message"), WRONG.values(), ids=WRONG)
def test_refused(content, message):
    with pytest.raises(ValueError, match=message):
        strategy_of(content)


@pytest.mark.parametrize(
    ("content", "message"),
    [({"steps": 3}, "no option steps"), ({"cache": "all"}, "cache 'all'"), ({"gen_length": 0}, "gen_length 0")],
    ids=["option", "cache", "gen_length"],
)
def test_refused_settings(content, message):
    with pytest.raises(ValueError, match=message):
        DiffusionDecoder.from_json(content)


def test_a_guide_is_loaded_from_its_path(tmp_path):
    guide = tiny_llama(V, seed=5)
    guide.save_pretrained(tmp_path)
    model, rows = contextual(SPECS["full"]), prompts()
    options = {"spec": SPECS["full"], "batch_size": 8}
    by_path, by_model = (
        DiffusionDecoder(gen_length=9, block_length=4, strategy=Guided(guide=of)).decode(model, rows, **options)
        for of in (str(tmp_path), guide)
    )
    for (_, found), (_, expected) in zip(by_path, by_model, strict=True):
        assert torch.equal(found.sequences, expected.sequences)
        assert torch.equal(found.guide_forwards, found.forwards)
    with pytest.raises(ValueError, match="give its path"):
        strategy_json(Guided(guide=guide))
