"""What CrossTokenizerTrainer takes for a teacher, and what it refuses in one line before anything is written."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from datasets import Dataset

from kdlib.data import prepare_dataset
from kdlib.objectives import ForwardKL
from kdlib.objectives.cross import ALM, ULD, DualSpace, HybridULD
from kdlib.samplers import RolloutConfig
from kdlib.teachers import EnsembleTeacher, HFTeacher, RoutedTeacher, SelfTeacher, VLLMTeacher
from kdlib.teachers.consistency import ConsistencyEnsemble
from kdlib.teachers.write_cache import write_cache
from kdlib.trainers import DistillationTrainer
from tests.serving.fake import FakeServer
from tests.teachers.test_vllm_teacher import Engine
from tests.tiny import tiny_llama
from tests.tokenizers.families import family
from tests.trainers.cross_plain import (
    PAIRS,
    W,
    cross_trainer,
    other_model,
    other_teacher,
    plain,
    rows_of,
    speaking,
    teachers_tokenizer,
    tiny_tokenizer_,
)
from tests.trainers.small import V, double, logged, saved, settings

GIVEN = ALM(temperature=4.0, debias=False, threshold=0.0)  # for which the log-probs of the row's tokens do
TOP = ULD(alignment="positional", top_k=5)
ON_POLICY = {"on_policy_fraction": 1.0, "max_completion_length": 4}
SHORT = {"max_length": 64}  # as the served teacher's rows are


def trained(directory: Path, objective: Any, **given: Any) -> Any:
    trainer = cross_trainer(directory, objective, **given)
    trainer.train()
    return trainer


# Teachers


@pytest.mark.parametrize("objective", [ALM(temperature=4.0), HybridULD()], ids=["alm", "hybrid"])
def test_an_ensemble_of_one_tokenizer(tmp_path: Path, objective: Any) -> None:
    teacher = EnsembleTeacher([other_teacher(1), other_teacher(2)])
    expected = plain(double(), (other_model(1), other_model(2)), PAIRS[:8], objective).loss()
    assert logged(trained(tmp_path, objective, teacher=teacher)) == [pytest.approx(expected.item(), rel=1e-6)]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    return saved(tmp_path_factory.mktemp("teacher"), other_model(dtype=torch.float32), teachers_tokenizer())


@pytest.fixture(scope="module")
def caches(tmp_path_factory: pytest.TempPathFactory, checkpoint: str) -> Callable[..., str]:
    """Caches of the eight rows in the teacher's tokens, as ``kdlib cache`` writes them."""
    root = tmp_path_factory.mktemp("caches")
    rows = prepare_dataset(Dataset.from_list(PAIRS[:8]), teachers_tokenizer(), max_length=512).dataset
    teacher = HFTeacher(other_model(dtype=torch.float32), vocab_size=W)

    def cache(kind: str, *, temperature: float = 1.0) -> str:
        directory = root / f"{kind}-{temperature}"
        if not directory.is_dir():
            write_cache(
                teacher,
                rows,
                directory=directory,
                kind=kind,  # type: ignore[arg-type]
                k=8,
                bits=32,
                temperature=temperature,
                tokenizer=teachers_tokenizer(),
                teacher_name=checkpoint,
            )
        return str(directory)

    return cache


@pytest.mark.parametrize(("kind", "objective"), [("topk", TOP), ("given", GIVEN)])
def test_a_cache_feeds_what_it_can(tmp_path: Path, caches: Callable[..., str], kind: str, objective: Any) -> None:
    """The rows are found by their ids in the teacher's tokens, whose tokenizer the cache names."""
    live = trained(tmp_path / "live", objective)
    cached = trained(tmp_path / "cached", objective, teacher=caches(kind), eval_dataset=rows_of("pairs", 4, 8))
    assert logged(cached) == [pytest.approx(logged(live)[0], rel=1e-5)]
    assert logged(cached, "grad_norm") == [pytest.approx(logged(live, "grad_norm")[0], rel=1e-5)]


def served_model() -> Any:
    """Without padding of its vocabulary, which a server does not cut."""
    return tiny_llama(W, seed=1, hidden=24)


@pytest.fixture
def engine() -> Engine:
    return Engine(served_model(), hidden=False)


@pytest.fixture
def server(engine: Engine, tmp_path_factory: pytest.TempPathFactory) -> Iterator[FakeServer]:
    with FakeServer(engine, root=saved(tmp_path_factory.mktemp("served"), engine.model, teachers_tokenizer())) as server:
        yield server


def bad(row: dict[str, str]) -> int:
    """The first of the teacher's tokens of a row, by which the server knows it; QUESTIONS 1 and 3 have the same."""
    return int(teachers_tokenizer().encode(row["prompt"])[0])


@pytest.mark.parametrize("spoilt", [[], [2], [0, 1, 2, 3]], ids=str)
def test_rows_that_a_server_cannot_score_are_left_out_on_both_sides(
    tmp_path: Path, engine: Engine, server: FakeServer, spoilt: list[int]
) -> None:
    """Two rows for each question; what is left of them is the cross-entropy."""
    engine.spoil = {bad(PAIRS[i]): lambda listed: [None] * len(listed) for i in spoilt}
    shape = {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 3, **SHORT}
    teacher = VLLMTeacher(server.url, signal="sampled")
    trainer = trained(tmp_path, GIVEN, teacher=teacher, config=shape, eval_dataset=rows_of("pairs", 0, 8))
    good = [row for i, row in enumerate(PAIRS[:8]) if i % 4 not in spoilt]
    every = plain(double(), served_model().double(), PAIRS[:8], GIVEN)
    expected = every.mean("cross_entropy")
    if good:
        expected = expected + plain(double(), served_model().double(), good, GIVEN).mean("distill")
    assert logged(trainer) == [pytest.approx(expected.item(), rel=1e-5)]
    assert logged(trainer, "teacher/bad_rows") == ([] if not spoilt else [2.0 * len(spoilt)])
    assert abs(trainer.evaluate()["eval_loss"] - expected.item()) < 0.5, "one step further"


def test_side_terms_leave_out_bad_rows_as_well(tmp_path: Path, engine: Engine, server: FakeServer) -> None:
    engine.hidden, engine.spoil = True, {bad(PAIRS[2]): lambda states: states * torch.nan}
    objective = ALM(temperature=4.0, hidden=0.5)
    trainer = cross_trainer(tmp_path, objective, teacher=VLLMTeacher(server.url), config=SHORT)
    matrix = trainer.tables.modules.weight.detach().clone()
    trainer.train()
    good = [row for i, row in enumerate(PAIRS[:8]) if i % 4 != 2]
    found = plain(double(), served_model().double(), good, objective, projection=matrix)
    expected = found.mean("distill") + 0.5 * found.mean("hidden")
    expected = expected + plain(double(), served_model().double(), PAIRS[:8], GIVEN).mean("cross_entropy")
    assert logged(trainer) == [pytest.approx(expected.item(), rel=1e-5)]


def test_answers_that_are_longer_in_the_teachers_tokens(tmp_path: Path, server: FakeServer) -> None:
    """What a server cannot take of them is left out, the rest is scored."""
    server.models[0]["max_model_len"] = 32
    config = {**ON_POLICY, "max_completion_length": 24, "max_length": 24, "rollout": RolloutConfig(temperature=0.0)}
    teacher = VLLMTeacher(server.url, signal="sampled")
    rows = [{"prompt": PAIRS[0]["prompt"]}] * 2
    trainer = trained(tmp_path, GIVEN, teacher=teacher, model=speaking(), rows=rows, config=config)
    (batch,) = trainer.batches
    assert batch["other"]["input_ids"].shape[1] == teacher.longest_row == 31
    assert (batch["other"]["chunk"].amax(1) > 3).all() and batch["chunk"].amax() == batch["other"]["chunk"].amax()
    assert not batch["unread"].any() and not logged(trainer, "teacher/bad_rows")


def test_a_tokenizer_without_a_padding_token(tmp_path: Path) -> None:
    tokenizer = copy.deepcopy(teachers_tokenizer())
    tokenizer.pad_token = None
    found = trained(tmp_path / "without", GIVEN, teacher=HFTeacher(other_model(), tokenizer=tokenizer))
    assert logged(found) == pytest.approx(logged(trained(tmp_path / "with", GIVEN)), rel=1e-6)


def test_models_of_several_tokenizers_speak_the_tokens_of_the_main_one(tmp_path: Path) -> None:
    """Which reads the rows; what the assistant says changes its distributions."""
    mixed = ConsistencyEnsemble(other_teacher(), [HFTeacher(tiny_llama(V, seed=2).double(), tokenizer=tiny_tokenizer_())])
    found = trained(tmp_path / "mixed", HybridULD(), teacher=mixed)
    alone = trained(tmp_path / "alone", HybridULD())
    assert logged(found, "alignment/chunked_ratio") == logged(alone, "alignment/chunked_ratio")
    assert logged(found)[0] != pytest.approx(logged(alone)[0], rel=1e-5)
    assert mixed.vocab_size == W


# What is refused


def refused(directory: Path, message: str, objective: Any = GIVEN, **given: Any) -> None:
    with pytest.raises(ValueError, match=message) as error:
        cross_trainer(directory, objective, **given)
    assert "\n" not in str(error.value)
    assert not list(directory.iterdir()), "nothing is written before everything fits"


ROUTED = {"a": other_teacher(1), "b": other_teacher(2)}
MIXED = [other_teacher(1), HFTeacher(tiny_llama(V), tokenizer=tiny_tokenizer_())]


@pytest.mark.parametrize(
    ("message", "given"),
    [
        ("packed rows of two tokenizers", {"config": {"packing": True}}),
        ("teachers by row need the student's tokenizer", {"teacher": RoutedTeacher(ROUTED)}),
        ("SelfTeacher", {"teacher": SelfTeacher()}),
        ("rollout_source teacher writes with a teacher", {"config": {**ON_POLICY, "rollout_source": "teacher"}}),
        ("rollout_source corrected writes with a teacher", {"config": {**ON_POLICY, "rollout_source": "corrected"}}),
        ("ALM needs a teacher", {"teacher": None}),
        ("trains objectives between tokenizers, not ForwardKL", {"objective": ForwardKL()}),
        ("HFTeacher has no tokenizer of its own: name it with teacher_tokenizer", {"teacher": HFTeacher(other_model())}),
        (f"tokenizer has {W} tokens, the teacher {V}", {"teacher": HFTeacher(tiny_llama(V), tokenizer=teachers_tokenizer())}),
        ("have different tokenizers: use ConsistencyEnsemble", {"teacher": EnsembleTeacher(MIXED)}),
        ("rows of token ids have no text", {"rows": [{"input_ids": [4, 5, 6]}]}),
        ("teacher_prompt need teachers of the student's tokenizer", {"rows": [{**PAIRS[0], "teacher_prompt": "So"}]}),
        ("teacher's tokenizer is not lossless", {"teacher": HFTeacher(other_model(), tokenizer=family("wordpiece"))}),
        ("student's tokenizer is not lossless", {"processing_class": family("wordpiece")}),
    ],
    ids=lambda given: given if isinstance(given, str) else "",
)
def test_what_does_not_fit(tmp_path: Path, message: str, given: dict[str, Any]) -> None:
    refused(tmp_path, message, **{"rows": PAIRS[:2], **given})


def test_other_trainers_name_this_one(tmp_path: Path) -> None:
    given: dict[str, Any] = {"train_dataset": PAIRS[:2], "processing_class": tiny_tokenizer_(), "args": settings(tmp_path)}
    for objective in (ALM(), ULD(), DualSpace()):
        with pytest.raises(ValueError, match=r"between two tokenizers: train with kdlib distill \(CrossTokenizerTrainer\)"):
            DistillationTrainer(tiny_llama(V), other_teacher(), objective=objective, **given)
    with pytest.raises(ValueError, match=r"different tokenizers.* such as ALM \(CrossTokenizerTrainer\)"):
        DistillationTrainer(tiny_llama(V), other_teacher(), objective=ForwardKL(), **given)
    assert not list(tmp_path.iterdir())


def test_a_student_that_teaches_itself(tmp_path: Path) -> None:
    """Also when a tokenizer is named for it."""
    tokenizer = saved(tmp_path / "teacher", tiny_llama(V), teachers_tokenizer())
    (tmp_path / "run").mkdir()
    refused(tmp_path / "run", "SelfTeacher", teacher=SelfTeacher(), config={"teacher_tokenizer": tokenizer})


def test_caches_that_say_too_little(tmp_path: Path, caches: Callable[..., str]) -> None:
    for objective in (ALM(), HybridULD(), DualSpace(), replace(GIVEN, hidden=1.0), GIVEN):
        message = f"CachedTeacher provides Support.TOPK, which cannot feed {type(objective).__name__}"
        refused(tmp_path, message, objective, teacher=caches("topk"))
    refused(tmp_path, "SAMPLED_STUDENT, which cannot feed ALM", ALM(), teacher=caches("given"))
    refused(tmp_path, "SAMPLED_STUDENT, which cannot feed ULD", TOP, teacher=caches("given"))


@pytest.mark.parametrize(("kind", "objective"), [("topk", TOP), ("given", GIVEN)])
def test_a_cache_of_another_temperature(tmp_path: Path, caches: Callable[..., str], kind: str, objective: Any) -> None:
    message = f"{type(objective).__name__} reads log-probs at temperature 1.0, the teacher's are at 2.0"
    refused(tmp_path, message, objective, teacher=caches(kind, temperature=2.0))


def test_a_cache_that_does_not_know_the_rows_or_the_tokenizer(tmp_path: Path, caches: Callable[..., str]) -> None:
    refused(tmp_path, "8 of 16 training rows are not in the cache", teacher=caches("given"), rows=rows_of("pairs", 0, 16))
    tokenizer = saved(tmp_path / "other", tiny_llama(V))
    (tmp_path / "run").mkdir()
    refused(tmp_path / "run", "tokenizer", teacher=caches("given"), config={"teacher_tokenizer": tokenizer})
    refused(
        tmp_path / "run", "no tokenizer at .*nowhere", teacher=caches("given"), config={"teacher_tokenizer": "./nowhere/at/all"}
    )


@pytest.mark.parametrize("objective", [ALM(hidden=0.5), DualSpace()], ids=["alm", "dual"])
def test_hidden_states_that_the_teacher_does_not_give(tmp_path: Path, objective: Any) -> None:
    teacher = EnsembleTeacher([other_teacher(1), other_teacher(2)])
    refused(tmp_path, f"{type(objective).__name__}.* hidden states", objective, teacher=teacher)


def test_embeddings_that_a_served_teacher_does_not_give(tmp_path: Path, engine: Engine, server: FakeServer) -> None:
    engine.hidden = True
    with pytest.raises(ValueError, match="DualSpace reads the teacher's embeddings: it needs a teacher in this process"):
        cross_trainer(tmp_path, DualSpace(), teacher=VLLMTeacher(server.url), config=SHORT)
    trained(tmp_path, DualSpace(alignment="chunks"), teacher=VLLMTeacher(server.url), config=SHORT)


@pytest.mark.parametrize("objective", [ALM(hidden=0.5), DualSpace()], ids=["alm", "dual"])
def test_modules_are_not_sharded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, objective: Any) -> None:
    """FSDP would keep them, and the embeddings, in parts."""
    monkeypatch.setattr(Accelerator, "distributed_type", "FSDP")
    with pytest.raises(ValueError, match=f"{type(objective).__name__} needs .* whole on each process, which FSDP does not"):
        cross_trainer(tmp_path, objective)
    cross_trainer(tmp_path, ALM())
