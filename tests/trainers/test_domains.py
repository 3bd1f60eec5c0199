"""Domain weights against their definition, what is drawn by them, what is measured, and that a run resumes to the same bits."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from kdlib.teachers import SelfTeacher
from kdlib.trainers import DistillationTrainer
from kdlib.trainers.callbacks import STATE_FILE
from kdlib.trainers.domains import Domains, first_weights, next_weights
from tests.tiny import tiny_llama
from tests.trainers.small import V, cross_entropy, logged, plain_loss, trainer_of, weights_of

GAPS = {"code": 3.0, "law": 1.0, "web": 1.5}
TEXTS = {"code": "two plus two is {}.", "law": "The sky is blue on day {}.", "web": "She had {} apples."}
ROWS = [{"text": TEXTS[name].format(i), "domain": name} for i in range(12) for name in ("web", "code", "law")][:-2]
CONFIG = {"domain_column": "domain", "domain_rows": 3, "domain_steps": 2, "max_steps": 6, "per_device_train_batch_size": 4}


class Known:
    """Gaps that are given, one after another."""

    def __init__(self, *gaps: Mapping[str, float]) -> None:
        self.left = list(gaps)

    def measure(self, trainer: Any) -> dict[str, float]:
        return dict(self.left.pop(0))


def domains(*gaps: Mapping[str, float], sizes: tuple[int, ...] = (5, 20, 8), **options: Any) -> Domains:
    starts = [0, 5, 25]
    members = {name: list(range(start, start + n)) for name, start, n in zip(GAPS, starts, sizes, strict=True)}
    made = Domains(members, Known(*gaps), **{"every": 10, "smoothing": 0.5, "seed": 0, **options})  # type: ignore[arg-type]
    made.begin(None, None)
    return made


# Weights


def test_weights_are_those_of_the_paper() -> None:
    """Equations 1 and 2, as they stand there."""
    total = sum(math.exp(gap) for gap in GAPS.values())
    first = {name: math.exp(gap) / total for name, gap in GAPS.items()}
    assert first_weights(GAPS) == pytest.approx(first, rel=1e-12)
    gaps = {"code": 1.1, "law": 2.0, "web": 1.0}
    psi = {name: first[name] * math.exp(gaps[name]) for name in gaps}
    expected = {name: 0.5 * psi[name] / sum(psi.values()) + 0.5 / 3 for name in psi}
    assert next_weights(first, gaps, smoothing=0.5) == pytest.approx(expected, rel=1e-12)


def test_smoothing_keeps_a_floor_and_forgets_by_its_factor() -> None:
    far = {"code": 5000.0, "law": 1.0, "web": 1.0}
    weights = next_weights(first_weights(GAPS), far, smoothing=0.5)
    assert weights == pytest.approx({"code": 0.5 + 0.5 / 3, "law": 0.5 / 3, "web": 0.5 / 3}), "finite, and nobody starves"
    equal = dict.fromkeys(GAPS, 1.2)
    for _ in range(3):
        before, weights = weights, next_weights(weights, equal, smoothing=0.5)
        for name in GAPS:
            assert weights[name] - 1 / 3 == pytest.approx(0.5 * (before[name] - 1 / 3))
    assert next_weights(weights, GAPS, smoothing=0.0) == pytest.approx(dict.fromkeys(GAPS, 1 / 3))


# Draws


def test_steps_are_split_by_the_weights() -> None:
    made = domains(GAPS)
    counts: Counter[str] = Counter()
    for step in range(1, 201):
        rows = made.rows(step, 10)
        of = Counter("code" if row < 5 else "law" if row < 25 else "web" for row in rows)
        for name, weight in made.weights.items():
            assert math.floor(10 * weight) <= of[name] <= math.ceil(10 * weight)
        counts += of
    for name, weight in made.weights.items():
        assert counts[name] == pytest.approx(2000 * weight, abs=40)


def test_a_domain_goes_through_all_its_rows_before_one_comes_again() -> None:
    made = domains(GAPS, smoothing=0.0)
    made.weights = dict.fromkeys(GAPS, 1 / 3)
    counts: Counter[int] = Counter()
    orders = [made.rows(step, 15) for step in range(1, 9)]  # five of each domain, which one of them is through with in a step
    for rows in orders:
        counts.update(rows)
        for members in made.members.values():
            drawn = [counts[row] for row in members]
            assert max(drawn) - min(drawn) <= 1
    passes = [[row for row in rows if row < 5] for rows in orders]
    assert all(sorted(one) == [0, 1, 2, 3, 4] for one in passes) and len({tuple(one) for one in passes}) > 4


def test_weights_move_after_every_so_many_steps() -> None:
    later = {"code": 1.0, "law": 2.0, "web": 1.0}
    made = domains(GAPS, later)
    for step in range(1, 10):
        made.after_step(None, step)
        assert made.weights == first_weights(GAPS)
    made.after_step(None, 10)
    assert made.weights == next_weights(first_weights(GAPS), later, smoothing=0.5)
    assert made.metrics["domain/law"] == made.weights["law"] and made.metrics["domain_gap/law"] == 2.0


def test_the_state_goes_through_json() -> None:
    made = domains(GAPS)
    for step in range(1, 6):
        made.rows(step, 7)
    other = domains(GAPS)
    other.begin(None, json.loads(json.dumps(made.state)))
    assert [other.rows(step, 7) for step in (6, 7)] == [made.rows(step, 7) for step in (6, 7)]
    assert other.metrics == made.metrics


# Runs


def trained(directory: Path, **given: Any) -> DistillationTrainer:
    trainer = trainer_of(directory, rows=ROWS, config={**CONFIG, **given.pop("config", {})}, **given)
    trainer.train()
    return trainer


def parts(trainer: DistillationTrainer) -> tuple[dict[str, list[Any]], dict[str, list[Any]]]:
    """({domain: rows that are measured}, {domain: rows that are trained on})."""
    assert trainer.step_rows is not None and trainer.train_rows is not None
    chooser: Any = trainer.step_rows.chooser
    rows = {name: [trainer.train_rows.dataset[i] for i in of] for name, of in chooser.members.items()}
    return dict(chooser.gaps.probes), rows


def test_gaps_are_perplexities_of_rows_that_are_not_trained_on(tmp_path: Path) -> None:
    trainer = trained(tmp_path, config={"max_steps": 1, "per_device_eval_batch_size": 2})
    measured, rows = parts(trainer)
    assert {name: len(of) for name, of in measured.items()} == dict.fromkeys(TEXTS, 3)
    for name in TEXTS:
        samples = [{row["sample_id"] for row in of[name]} for of in (measured, rows)]
        assert not samples[0] & samples[1] and len(samples[0] | samples[1]) == sum(row["domain"] == name for row in ROWS)
        student, teacher = (plain_loss(tiny_llama(V, seed=seed), None, measured[name], cross_entropy).item() for seed in (0, 1))
        assert logged(trainer, f"domain_gap/{name}")[0] == pytest.approx(math.exp(student - teacher), rel=1e-4)
    weights = {name: logged(trainer, f"domain/{name}")[0] for name in TEXTS}
    assert weights == pytest.approx(first_weights({name: logged(trainer, f"domain_gap/{name}")[0] for name in TEXTS}))


def test_what_is_trained_on_follows_the_weights(tmp_path: Path) -> None:
    """A teacher that is the student but for one domain, which has a gap of more than 1 alone."""
    trainer = trainer_of(tmp_path, rows=ROWS, config={**CONFIG, "max_steps": 8, "domain_steps": 100})
    assert trainer.step_rows is not None
    chooser: Any = trainer.step_rows.chooser
    chooser.gaps = Known({"code": 4.0, "law": 1.0, "web": 1.0})
    seen: Counter[str] = Counter()
    original = trainer.step_rows.at

    def at(places: Any) -> Any:
        rows = original(places)
        seen.update(row["domain"] for row in rows)
        return rows

    trainer.step_rows.at = at  # type: ignore[method-assign]
    trainer.train()
    assert seen.total() == 25 + 4, "an epoch is as long as there are rows to train on, and its last step has one"
    assert seen["code"] == pytest.approx(29 * chooser.weights["code"], abs=4) and chooser.weights["code"] > 0.9


class Equal:
    """Measures, and then says that all gaps are equal."""

    def __init__(self, real: Any) -> None:
        self.real = real

    def measure(self, trainer: Any) -> dict[str, float]:
        return dict.fromkeys(self.real.measure(trainer), 1.0)


def test_measuring_changes_nothing_else(tmp_path: Path) -> None:
    """No random number and no mode of the student's modules: the losses are the same however often it happens."""
    found = []
    for every in (1, 100):
        trainer = trainer_of(
            tmp_path / str(every),
            rows=ROWS,
            model=tiny_llama(V, attention_dropout=0.2),
            config={**CONFIG, "domain_steps": every, "max_steps": 4},
        )
        assert trainer.step_rows is not None
        chooser: Any = trainer.step_rows.chooser
        chooser.gaps = Equal(chooser.gaps)
        trainer.train()
        found.append(logged(trainer))
    assert found[0] == found[1] and len(set(found[0])) == 4


def test_the_same_run_however_a_step_is_split(tmp_path: Path) -> None:
    whole = trained(tmp_path / "whole")
    split = trained(tmp_path / "split", config={"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2})
    for key in ("loss", "domain/code", "domain_gap/law"):
        assert logged(split, key) == pytest.approx(logged(whole, key), rel=1e-4), key


@pytest.mark.parametrize("step", [2, 3, 4])
def test_a_resumed_run_ends_with_the_same_bits(tmp_path: Path, step: int) -> None:
    """From a step in which the weights moved, and between two of them."""
    config = {**CONFIG, "save_strategy": "steps", "save_steps": 1, "save_total_limit": None}

    def made(name: str) -> DistillationTrainer:
        return trainer_of(tmp_path / name, rows=ROWS, config=config, model=tiny_llama(V, attention_dropout=0.2))

    whole, resumed = made("whole"), made("resumed")
    whole.train()
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{step}"))
    for name, expected in weights_of(whole).items():
        assert torch.equal(weights_of(resumed)[name], expected), name
    ends = [(tmp_path / run / "checkpoint-6" / STATE_FILE).read_text() for run in ("whole", "resumed")]
    assert ends[0] == ends[1] and "drawn" in ends[0]
    for key in ("loss", "domain/code"):
        assert logged(resumed, key)[-2:] == logged(whole, key)[-2:]


@pytest.mark.parametrize(
    ("config", "given", "message"),
    [
        ({}, {"teacher": None}, "domain_column compares student and teacher token by token"),
        ({}, {"teacher": SelfTeacher(kind="ema")}, "it needs a teacher with whole distributions"),
        ({"domain_rows": 11}, {}, "domain code has 11 rows, of which 11 are to be measured|domain law has 11 rows"),
        ({"domain_column": "topic"}, {}, "the rows have no column topic"),
        ({"domain_smoothing": 2.0}, {}, "domain_smoothing is a share"),
        ({}, {"rows": [{**row, "domain": "web"} for row in ROWS]}, "names one domain only"),
    ],
)
def test_what_is_refused(tmp_path: Path, config: dict[str, Any], given: dict[str, Any], message: str) -> None:
    from kdlib.objectives import CrossEntropy

    if given.get("teacher", 0) is None:
        given = {**given, "objective": CrossEntropy()}
    with pytest.raises(ValueError, match=message):
        trainer_of(tmp_path, **{"rows": ROWS, **given}, config={**CONFIG, **config})
