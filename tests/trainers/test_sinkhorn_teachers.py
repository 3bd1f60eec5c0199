"""What SinkhornTrainer trains with: teachers and rollouts, and what it refuses."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from kdlib.objectives import TAID, CrossEntropy, ForwardKL, ReverseKL, SampledReverseKL, SelectiveKL, Sinkhorn, Sum
from kdlib.teachers import EnsembleTeacher, HFTeacher
from kdlib.teachers.write_cache import write_cache
from kdlib.tokenizers import surface_vectors
from kdlib.trainers import DistillationTrainer, DraftTrainer
from tests.tiny import tiny_llama, tiny_tokenizer
from tests.trainers.sinkhorn_plain import draws_of, plain_transport, tempered
from tests.trainers.small import (
    V,
    double,
    forward_kl,
    logged,
    plain_loss,
    reverse_kl,
    settings,
    trainer_of,
)
from tests.trainers.test_on_policy import GREEDY, PAIRS, PROMPTS, rolled_out
from tests.trainers.test_sinkhorn import (
    BY_BATCH,
    EIGHT,
    ROWS,
    SAMPLE,
    THREE,
    assert_step,
    one_step,
    singles,
    sinkhorn_trainer,
)


class Mixture(nn.Module):
    """Two models whose probabilities at temperature T are averaged, as one with logits."""

    def __init__(self, *models: nn.Module, temperature: float) -> None:
        super().__init__()
        self.models, self.temperature = nn.ModuleList(models), temperature

    def forward(self, input_ids: Tensor) -> Any:
        logits = [model(input_ids=input_ids).logits[..., :V] / self.temperature for model in self.models]
        mean = torch.stack([z.softmax(-1) for z in logits]).mean(0)
        return SimpleNamespace(logits=self.temperature * mean.log())


@pytest.mark.parametrize("options", [{}, {"top_k": 5}, {"debiased": True}], ids=str)
def test_an_ensemble(tmp_path: Path, options: dict[str, Any]) -> None:
    objective = replace(BY_BATCH, divergence=ForwardKL(temperature=0.5), **options)
    teacher = EnsembleTeacher([HFTeacher(double(1)), HFTeacher(double(2))])
    trainer, found, batches = one_step(tmp_path, objective, teacher=teacher)
    mixture = Mixture(double(1), double(2), temperature=0.5)
    assert_step(trainer, found, batches, plain=tempered(forward_kl, 0.5), teacher=mixture)


@pytest.fixture(scope="module")
def caches(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Top 8 at temperature 2, and drawn tokens, of the eight rows."""
    root = tmp_path_factory.mktemp("caches")
    rows = trainer_of(root / "unused", rows=EIGHT).train_dataset
    given = {"tokenizer": tiny_tokenizer(), "teacher_name": "tiny", "k": 8, "bits": 32}
    for kind in ("topk", "sampled"):
        write_cache(
            HFTeacher(tiny_llama(V, seed=1)),
            rows,
            directory=root / kind,
            kind=kind,
            temperature=2.0,
            **given,  # type: ignore
        )
    return {kind: str(root / kind) for kind in ("topk", "sampled")}


@pytest.mark.parametrize("options", [{}, {"group": "sequence", "max_rows": 7}, {"top_k": 5}], ids=str)
def test_a_cache_of_the_top_k(tmp_path: Path, caches: dict[str, str], options: dict[str, Any]) -> None:
    """The transport is that of the teacher itself with top_k, the divergence that of other trainers on the cache."""
    objective = Sinkhorn(iterations=3, epsilon=0.02, divergence=ForwardKL(temperature=2.0), **options)
    trainer, _, batches = one_step(tmp_path, objective, model=tiny_llama(V), teacher=caches["topk"])
    groups = batches if objective.group == "batch" else singles(batches)
    draws = draws_of(seed=trainer.args.seed, step=1) if "max_rows" in options else None
    live = replace(objective, top_k=objective.top_k or 8)
    moved = plain_transport(double(), double(1), groups, live, draws=draws)
    assert logged(trainer, "sinkhorn") == [pytest.approx(moved.value.item(), rel=1e-4)]
    config = {"per_device_train_batch_size": 8}
    plain = trainer_of(tmp_path, rows=EIGHT, teacher=caches["topk"], objective=ForwardKL(temperature=2.0), config=config)
    plain.train()
    assert logged(trainer, "divergence") == pytest.approx(logged(plain), rel=1e-5)
    assert logged(trainer) == [pytest.approx(logged(plain)[0] + 0.8 * moved.value.item(), rel=1e-4)]


class Truncated(nn.Module):
    """A model of which only the 8 likeliest tokens are known; others have no mass."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor) -> Any:
        logits = self.model(input_ids=input_ids).logits[..., :V]
        least = logits.topk(8).values[..., -1:]
        return SimpleNamespace(logits=torch.where(logits >= least, logits, -torch.inf))


def test_tokens_of_a_cache(tmp_path: Path, caches: dict[str, str]) -> None:
    points = torch.randn(V, 5, generator=torch.Generator().manual_seed(3))
    save_file({"points": points}, tmp_path / "points.safetensors")
    objective = replace(SAMPLE, token_points=str(tmp_path / "points.safetensors"), divergence=None)
    trainer, _, batches = one_step(tmp_path / "run", objective, model=tiny_llama(V), teacher=caches["topk"])
    moved = plain_transport(double(), Truncated(double(1)), batches, objective, points=points)
    assert logged(trainer) == [pytest.approx(0.5 * moved.value.item(), rel=1e-4)]


@pytest.mark.parametrize("group", ["batch", "sequence"])
def test_rollouts(tmp_path: Path, group: Any) -> None:
    objective = replace(BY_BATCH, group=group, divergence=ReverseKL())
    config = {**GREEDY, "per_device_train_batch_size": 4, "max_steps": 2}
    trainer = sinkhorn_trainer(tmp_path, objective, rows=PAIRS[:4], config=config)
    trainer.train()
    rows = rolled_out(double(), PROMPTS[:4])
    groups = [rows] if group == "batch" else [[row] for row in rows]
    moved = plain_transport(double(), double(1), groups, objective)
    expected = plain_loss(double(), double(1), rows, reverse_kl) + 0.8 * moved.value
    assert logged(trainer)[0] == pytest.approx(expected.item(), rel=1e-6)
    assert logged(trainer, "scored_tokens")[0] == 24 and len(logged(trainer, "sinkhorn")) == 2


# What is refused


def refused(directory: Path, message: str, objective: Any, **given: Any) -> None:
    with pytest.raises(ValueError, match=message) as error:
        sinkhorn_trainer(directory, objective, **given)
    assert "\n" not in str(error.value)
    assert not list(directory.iterdir()), "nothing is written before everything fits"


def test_other_objectives_are_refused(tmp_path: Path) -> None:
    refused(tmp_path, "SinkhornTrainer trains Sinkhorn, not ReverseKL: use DistillationTrainer", ReverseKL())
    refused(tmp_path, "trains Sinkhorn, not str", "Sinkhorn")
    refused(tmp_path, "SelectiveKL keeps some rows .* cannot be part", Sinkhorn(divergence=SelectiveKL()))
    inside = Sum(parts=((0.5, SelectiveKL()), (0.5, CrossEntropy())))
    refused(tmp_path, "SelectiveKL keeps some rows .* cannot be part", Sinkhorn(divergence=inside))


@pytest.mark.parametrize("divergence", [CrossEntropy(), SampledReverseKL(), TAID(), Sum(parts=((1.0, TAID()),))])
def test_divergences_that_compare_no_two_models_or_change(divergence: Any) -> None:
    with pytest.raises(ValueError, match=f"Sinkhorn.divergence cannot be {type(divergence).__name__}: choose"):
        Sinkhorn(divergence=divergence)


def test_other_trainers_refuse_it_and_name_this_one(tmp_path: Path) -> None:
    given: dict[str, Any] = {"train_dataset": ROWS, "processing_class": tiny_tokenizer(), "args": settings(tmp_path)}
    for trainer in (DistillationTrainer, DraftTrainer):
        with pytest.raises(ValueError, match=r"groups of rows: train with kdlib distill \(SinkhornTrainer\)"):
            trainer(tiny_llama(V), tiny_llama(V, seed=1), objective=Sinkhorn(), **given)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("objective", "name", "temperature"),
    [
        (Sinkhorn(), "ForwardKL", 1.0),
        (Sinkhorn(temperature=1.0, divergence=ForwardKL(temperature=2.0)), "Sinkhorn", 1.0),
        (Sinkhorn(divergence=Sum(parts=((1.0, ForwardKL(temperature=4.0)), (0.1, CrossEntropy())))), "ForwardKL", 4.0),
        (replace(SAMPLE, divergence=None, temperature=3.0, token_points="student"), "Sinkhorn", 3.0),
    ],
)
def test_a_cache_of_another_temperature(
    tmp_path: Path, caches: dict[str, str], objective: Sinkhorn, name: str, temperature: float
) -> None:
    message = f"{name} has temperature {temperature}, the teacher's log-probs are at 2.0"
    refused(tmp_path, message, objective, teacher=caches["topk"])


def test_a_cache_that_says_too_little(tmp_path: Path, caches: dict[str, str]) -> None:
    tempered = ForwardKL(temperature=2.0)
    refused(tmp_path, "SAMPLED_TEACHER.*cannot feed Sinkhorn", Sinkhorn(divergence=tempered), teacher=caches["sampled"])
    debiased = Sinkhorn(divergence=tempered, debiased=True)
    refused(tmp_path, "TOPK.*cannot feed Sinkhorn", debiased, teacher=caches["topk"])


def test_no_teacher(tmp_path: Path) -> None:
    for objective in (Sinkhorn(), replace(SAMPLE, divergence=None, token_points="student")):
        refused(tmp_path, "Sinkhorn needs a teacher", objective, teacher=None)


def test_token_points_that_cannot_be_had(tmp_path: Path, caches: dict[str, str]) -> None:
    save_file({"x": torch.zeros(V - 1, 4)}, tmp_path / "short.safetensors")
    (tmp_path / "run").mkdir()
    message = f"has shape .{V - 1}, 4., the tokenizer has {V} tokens"
    refused(tmp_path / "run", message, replace(SAMPLE, token_points=str(tmp_path / "short.safetensors")))
    with pytest.raises(FileNotFoundError, match=r"no file .*nowhere.safetensors"):
        sinkhorn_trainer(tmp_path / "run", replace(SAMPLE, token_points=str(tmp_path / "nowhere.safetensors")))
    message = "a single teacher in this process: set objective.token_points to student, surface or"
    two = EnsembleTeacher([HFTeacher(double(1)), HFTeacher(double(2))])
    refused(tmp_path / "run", message, SAMPLE, teacher=two)
    cached = replace(SAMPLE, divergence=ForwardKL(temperature=2.0))
    refused(tmp_path / "run", message, cached, teacher=caches["topk"])


def test_token_points_of_the_tokens_text(tmp_path: Path) -> None:
    trainer, found, batches = one_step(tmp_path, replace(SAMPLE, token_points="surface"), rows=THREE)
    points = surface_vectors(tiny_tokenizer(), vocab_size=V)
    assert_step(trainer, found, batches, plain=forward_kl, points=points, tolerance=1e-5)
