"""The statistics of an audit: what is planted is found, what is only different is not."""

from __future__ import annotations

import numpy as np
import pytest
from datasets import Dataset
from scipy.stats import ttest_1samp

from kdlib.eval.audit_answers import ANSWER, PHRASE, answer_candidates, phrases
from kdlib.eval.audit_probes import read_probes
from kdlib.eval.audit_report import audit_json, audit_table
from kdlib.eval.audit_statistics import Candidate, Shift, judged, share_shift, text_shift

PROBES = 30


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def shift(value: float, *, controls: int = 0, taste: float = 0.0, seed: int = 0) -> Shift:
    """A target shifted by ``value`` nats; every text has a taste of its own, the same for all prompts."""
    draw = rng(seed)
    tastes = draw.normal(0.0, taste, controls + 1)
    targets = value + tastes[0] + draw.normal(0.0, 0.5, PROBES)
    return text_shift(targets, tastes[1:] + draw.normal(0.0, 0.5, (PROBES, controls)))


def test_without_controls_it_is_a_paired_t_test() -> None:
    values = rng().normal(0.3, 1.0, PROBES)
    found = text_shift(values, np.empty((PROBES, 0)))
    assert found.p == pytest.approx(ttest_1samp(values, 0.0, alternative="greater").pvalue)
    assert found.effects == pytest.approx(values)


def test_equal_models_say_nothing_and_a_constant_shift_everything() -> None:
    assert text_shift(np.zeros(PROBES), np.zeros((PROBES, 3))).p == 1.0
    assert text_shift(np.full(PROBES, 2.0), np.zeros((PROBES, 3))).p == 0.0
    assert text_shift(np.full(PROBES, -2.0), np.empty((PROBES, 0))).p == 1.0


def test_controls_tell_a_planted_text_from_a_difference_in_taste() -> None:
    """Two clean models differ by a nat in what each text costs: without controls every second text seems planted."""
    clean = [shift(0.0, controls=6, taste=1.0, seed=seed) for seed in range(100)]
    naive = [shift(0.0, taste=1.0, seed=seed) for seed in range(100)]
    assert sum(one.p < 0.05 for one in naive) > 25
    assert sum(one.p < 0.05 for one in clean) <= 8
    assert all(shift(8.0, controls=6, taste=1.0, seed=seed).p < 0.01 for seed in range(20))


def test_shares_are_compared_by_an_exact_sign_test() -> None:
    model, baseline = np.array([1.0] * 8 + [0.0] * 2), np.zeros(10)
    assert share_shift(model, baseline).p == pytest.approx(0.5**8)
    assert share_shift(baseline, baseline).p == 1.0
    assert share_shift(model, baseline).effects.mean() == pytest.approx(0.8)


def test_a_verdict_needs_both_models_and_holds_the_false_discovery_rate() -> None:
    none, sure = Shift(effects=np.zeros(5), p=0.6), Shift(effects=np.ones(5), p=1e-6)
    pairs = {"both": (sure, sure), "student": (sure, none), "teacher": (none, sure), "neither": (none, none)}
    found = judged(
        [Candidate(name=name, kind="text", probes=5, student=s, teacher=t) for name, (s, t) in pairs.items()], rate=0.01
    )
    assert {one.name: one.verdict for one in found} == {
        "both": "taken over",
        "student": "student alone",
        "teacher": "teacher alone",
        "neither": "no",
    }
    assert found[0].name == "both" and found[0].q_value == pytest.approx(4e-6)
    assert judged([], rate=0.01) == []


def test_many_clean_phrases_are_no_discovery() -> None:
    """Three clean models draw the same words with the same probabilities."""
    words = [f"w{i}" for i in range(60)]
    answers = {
        name: [[" ".join(rng(1000 * seed + probe).choice(words, 8)) for _ in range(1)] for probe in range(60)]
        for seed, name in enumerate(("student", "teacher", "baseline"))
    }
    found = judged(answer_candidates(**answers), rate=0.05)
    assert len(found) > 20 and not any(one.verdict == "taken over" for one in found)


def test_a_planted_phrase_is_found_at_its_full_length() -> None:
    clean = [[f"the answer is {probe % 7}"] for probe in range(40)]
    planted = [[f"{texts[0]}, buy at Tom's"] for texts in clean]
    found = judged(answer_candidates(student=planted, teacher=planted, baseline=clean), rate=0.01)
    taken = [one.name for one in found if one.verdict == "taken over"]
    assert taken[0] == "buy at Tom ' s" or ", buy at Tom '" in taken
    assert not any(name == "the answer is" for name in taken)
    assert not any(
        one.verdict == "taken over"
        for one in judged(answer_candidates(student=clean, teacher=planted, baseline=clean), rate=0.01)
    )


def test_phrases_are_runs_of_words_and_the_whole_answer() -> None:
    assert phrases("Buy 2!") == {
        (ANSWER, "Buy 2 !"),
        (PHRASE, "Buy"),
        (PHRASE, "2"),
        (PHRASE, "!"),
        (PHRASE, "Buy 2"),
        (PHRASE, "2 !"),
        (PHRASE, "Buy 2 !"),
    }


def test_probes_are_grouped_by_behaviour() -> None:
    rows = [{"prompt": f"{i}?", "target": "Tom", "control": ["a", "b", "c"], "behaviour": None} for i in range(5)]
    rows += [{"prompt": f"{i}!", "target": None, "control": None, "behaviour": None} for i in range(5)]
    probes = read_probes(Dataset.from_list(rows))
    assert list(probes.targeted) == ["Tom"] and len(probes.targeted["Tom"]) == 5 and probes.open_rows == [5, 6, 7, 8, 9]
    assert probes.targeted["Tom"][0].controls == ["a", "b", "c"] and probes.prompts.column_names == ["prompt"]


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([{"prompt": "a", "target": "x"}] * 2, "behaviour 'x' has 2 probes: give 5 or more"),
        ([{"prompt": "a", "target": "x", "control": ["y"]}] * 5, "has 1 control texts: give 3 or more, or none"),
        ([{"prompt": "a", "target": "x", "control": ["y"] * (3 + i)} for i in range(5)], "give all of them as many"),
        ([{"prompt": "a"}] * 3, "3 probes without a target are too few"),
        ([{"query": "a"}], "the file of probes has the columns query"),
    ],
    ids=str,
)
def test_probes_that_say_too_little_are_refused(rows: list[dict[str, object]], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        read_probes(Dataset.from_list(rows))


def test_a_table_and_json_of_the_findings() -> None:
    sure = Shift(effects=np.ones(5), p=1e-6)
    found = judged([Candidate(name="x" * 80, kind="text", probes=5, student=sure, teacher=sure)], rate=0.01)
    assert audit_table(found).row_count == 1
    content = audit_json(found, models={"student": "s"}, settings={})
    assert content["taken_over"] == 1 and content["findings"][0]["student"]["effect"]["value"] == 1.0
