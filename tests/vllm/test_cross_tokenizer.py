"""A teacher in vLLM whose tokens are not the student's trains as the same model in process does."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kdlib.objectives import ALM, HybridULD
from kdlib.trainers import CrossTokenizerTrainer
from tests.tiny import tiny_llama, tiny_tokenizer
from tests.trainers.cross_plain import PAIRS, W, teachers_tokenizer
from tests.trainers.small import V, logged, saved, settings
from tests.vllm.servers import ServedModel

pytestmark = pytest.mark.vllm

ENGINE = ("--dtype", "float32", "--enforce-eager", "--max-model-len", "128")
POOLING = ("--runner", "pooling", "--convert", "embed", "--pooler-config", '{"task":"token_embed","use_activation":false}')
GIVEN = ALM(debias=False, threshold=0.0)  # log-probs of the teacher's own tokens suffice


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> str:
    model = tiny_llama(W, hidden=128, seed=1, tie_word_embeddings=False)
    return saved(tmp_path_factory.mktemp("models") / "teacher", model, teachers_tokenizer())


def losses(directory: Path, teacher: Any, objective: Any, **config: Any) -> list[float]:
    made = CrossTokenizerTrainer(
        tiny_llama(V),
        teacher,
        objective=objective,
        args=settings(directory, max_length=96, **{"max_steps": 3, "learning_rate": 1e-2, **config}),
        train_dataset=PAIRS,
        processing_class=tiny_tokenizer(),
    )
    try:
        made.train()
    finally:
        made.close()
    return logged(made)


@pytest.mark.parametrize("config", [{}, {"on_policy_fraction": 1.0, "max_completion_length": 12}], ids=["rows", "rollouts"])
def test_log_probs_of_its_own_tokens(
    tmp_path: Path, teacher: str, serve: Callable[..., ServedModel], config: dict[str, Any]
) -> None:
    served = serve(teacher, *ENGINE)
    expected = losses(tmp_path / "hf", teacher, GIVEN, **config)
    found = losses(tmp_path / "vllm", served.url, GIVEN, signal="sampled", **config)
    assert found == pytest.approx(expected, rel=1e-4)


def test_whole_distributions(tmp_path: Path, teacher: str, serve: Callable[..., ServedModel]) -> None:
    served = serve(teacher, *ENGINE, *POOLING)
    for objective in (ALM(), HybridULD()):
        expected = losses(tmp_path / "hf", teacher, objective)
        assert losses(tmp_path / "vllm", served.url, objective) == pytest.approx(expected, rel=1e-4)
