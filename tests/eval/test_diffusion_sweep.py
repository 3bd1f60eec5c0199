"""A sweep counts what the decoder counts, continues where it was stopped, and refuses other settings."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from kdlib.decoding.diffusion_decoder import DiffusionDecoder
from kdlib.decoding.strategies import strategy_of
from kdlib.diffusion import spec_of
from kdlib.eval import diffusion
from kdlib.eval.diffusion_point import Point
from kdlib.eval.diffusion_result import DiffusionSweep
from kdlib.eval.diffusion_sweep import expanded
from tests.eval.diffusion_models import tiny_diffusion
from tests.tiny import tiny_tokenizer

TOKENIZER = tiny_tokenizer()
PROMPTS = [[1, 5, 9], [1, 7], [1, 4, 4, 8]]
STRATEGIES = [{"ConfidenceThreshold": {"threshold": [0.05, 0.9]}}, {"LowConfidence": {"steps": 6}}]
OPTIONS: dict[str, Any] = {"tokenizer": TOKENIZER, "prompts": PROMPTS, "gen_length": 6, "block_length": 3, "batch_size": 2}


def model(seed: int = 0) -> Any:
    return tiny_diffusion(len(TOKENIZER), seed=seed)


def test_lists_stand_for_one_strategy_each() -> None:
    assert expanded(["Factor", {"Factor": {"factor": 1.0}}])[0].keys() == {"Factor"}
    found = expanded([{"ConfidenceThreshold": {"threshold": [0.5, 0.7, 0.5]}}, {"LowConfidence": {"steps": 4}}])
    assert [next(iter(one.values())) for one in found] == [{"threshold": 0.5}, {"threshold": 0.7}, {"steps": 4}]
    with pytest.raises(ValueError, match="no strategy Guess"):
        expanded([{"Guess": {}}])
    with pytest.raises(ValueError, match="threshold"):
        expanded([{"ConfidenceThreshold": {"threshold": [0.5, 1.7]}}])
    with pytest.raises(ValueError, match="a strategy is Name or"):
        expanded([{"Factor": {}, "LowConfidence": {}}])


def test_prompts_are_counted_as_the_decoder_counts() -> None:
    student, teacher = model(0), model(1)
    found = diffusion(student, base=teacher, strategies=STRATEGIES, **OPTIONS)
    assert [(point.model, point.way) for point in found.points] == [
        (name, way)
        for name in ("base", "model")
        for way in ("ConfidenceThreshold(threshold=0.05)", "ConfidenceThreshold(threshold=0.9)", "LowConfidence(steps=6)")
    ]
    for point in found.points:
        decoder = DiffusionDecoder(gen_length=6, block_length=3, strategy=strategy_of(point.strategy))
        one = teacher if point.model == "base" else student
        alone = [next(decoder.decode(one, [ids], spec=spec_of(one.config), batch_size=1))[1] for ids in PROMPTS]
        order = [1, 0, 2]  # by length
        assert point.tokens == [int(alone[i].lengths[0]) for i in order]
        assert point.forwards == [int(alone[i].forwards[0]) for i in order]
        estimate = point.tokens_per_forward(resamples=200, seed=0)
        assert estimate.value == pytest.approx(sum(point.tokens) / sum(point.forwards))
    reference = found.reference("prompts")
    assert reference is not None and (reference.model, reference.family) == ("base", "LowConfidence")
    fewer = found.fewer_forwards(found.points[3], reference)
    assert fewer.value == pytest.approx(sum(reference.forwards) / sum(found.points[3].forwards))
    assert found.aup("prompts") == {} and found.to_json()["points"][0]["answers"] == 3


class StoppedError(Exception):
    pass


def test_it_continues_where_it_was_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was kept is not decoded again; a file that was being written is no point."""
    one, decode, seen = model(), DiffusionDecoder.decode, []

    def watched(self: DiffusionDecoder, *arguments: Any, **options: Any) -> Any:
        seen.append(self.strategy)
        if len(seen) == 3:
            raise StoppedError
        return decode(self, *arguments, **options)

    monkeypatch.setattr(DiffusionDecoder, "decode", watched)
    with pytest.raises(StoppedError):
        diffusion(one, strategies=STRATEGIES, output_path=tmp_path, **OPTIONS)
    kept = sorted((tmp_path / "points").glob("*.json"))
    assert len(kept) == 2 and all(json.loads(path.read_text())["settings"]["gen_length"] == 6 for path in kept)
    before = {path: path.read_bytes() for path in kept}
    (tmp_path / "points" / "half.json.partial").write_text('{"model')
    found = diffusion(one, strategies=STRATEGIES, output_path=tmp_path, **OPTIONS)
    assert len(seen) == 4 and seen[3] == seen[2]
    assert {path: path.read_bytes() for path in kept} == before
    again = diffusion(one, strategies=STRATEGIES, output_path=tmp_path, **OPTIONS)
    assert len(seen) == 4 and again.points == found.points
    more = diffusion(one, strategies=[*STRATEGIES, "Factor"], output_path=tmp_path, **OPTIONS)
    assert len(seen) == 5 and more.points[:3] == found.points


def test_other_settings_are_refused_and_listed(tmp_path: Path) -> None:
    diffusion(model(), strategies=["Factor"], output_path=tmp_path, **OPTIONS)
    for changed in ({"gen_length": 4}, {"batch_size": 1}, {"prompts": PROMPTS[:2]}, {"cache": "prefix"}):
        with pytest.raises(ValueError, match="type them as they were") as caught:
            diffusion(model(), strategies=["Factor"], output_path=tmp_path, **{**OPTIONS, **changed})
        assert f"{next(iter(changed))}" in str(caught.value)


def test_what_cannot_be_measured_is_said() -> None:
    with pytest.raises(ValueError, match="nothing to measure"):
        diffusion(model(), tokenizer=TOKENIZER)
    with pytest.raises(ValueError, match="no preset x: choose llada, dream"):
        diffusion(model(), preset="x", **OPTIONS)
    with pytest.raises(ValueError, match="measured with its tokenizer"):
        diffusion(model(), prompts=PROMPTS)
    with pytest.raises(ValueError, match="gen_length 600 leaves no room"):
        diffusion(model(), **{**OPTIONS, "gen_length": 600})


def point(name: str, strategy: dict[str, Any], *, accuracy: float, rho: float) -> Point:
    row = {"task": "sums", "metric": "exact_match", "filter": "none", "value": accuracy}
    shared = {"task": "sums", "scores": [row], "guide_forwards": 0, "seconds": 1.0, "machine": "cpu"}
    return Point(model=name, strategy=strategy, tokens=[round(100 * rho)] * 2, forwards=[100] * 2, **shared)


def test_curves_and_their_areas_by_hand() -> None:
    """The one-token-per-step point opens each curve of its model; y_max is the best of both models."""
    one_by_one, half = ({"LowConfidence": {"steps": steps}} for steps in (8, 4))
    low, high = ({"ConfidenceThreshold": {"threshold": threshold}} for threshold in (0.5, 0.9))
    points = [
        point("base", one_by_one, accuracy=0.80, rho=1.0),
        point("base", half, accuracy=0.70, rho=2.0),
        point("base", high, accuracy=0.78, rho=1.5),
        point("model", low, accuracy=0.76, rho=4.0),
        point("model", high, accuracy=0.79, rho=2.0),
    ]
    sweep = DiffusionSweep(settings={"gen_length": 8, "seed": 0}, points=points)
    assert sweep.curves("sums") == {
        ("base", "LowConfidence"): [(1.0, 80.0), (2.0, 70.0)],
        ("base", "ConfidenceThreshold"): [(1.0, 80.0), (1.5, 78.0)],
        ("model", "ConfidenceThreshold"): [(2.0, 79.0), (4.0, 76.0)],
    }
    w = {y: y * math.exp(-3 * (1 - y / 80)) for y in (80, 79, 78, 76)}
    expected = [80.0, 80.0 + 0.5 * (w[80] + w[78]) / 2, 2 * 79.0 + 2.0 * (w[79] + w[76]) / 2]
    assert list(sweep.aup("sums").values()) == pytest.approx(expected)
