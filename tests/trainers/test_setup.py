"""What users may give as student, teacher and rows, and the one line they get for what does not fit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import BitsAndBytesConfig

from kdlib.objectives import CrossEntropy, DecoupledTopK, ForwardKL, ReverseKL, Sum
from kdlib.teachers import CachedTeacher, HFTeacher
from kdlib.teachers.write_cache import write_cache
from kdlib.trainers import DistillationTrainer, setup
from tests.tiny import tiny_llama, tiny_tokenizer
from tests.trainers.small import ROWS, TEXTS, V, logged, saved, settings, trainer_of


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> str:
    return saved(tmp_path_factory.mktemp("models") / "student", tiny_llama(V))


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> str:
    return saved(tmp_path_factory.mktemp("models") / "teacher", tiny_llama(V, seed=1))


def test_model_teacher_and_rows_are_enough(tmp_path: Path, student: str, teacher: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    trainer = DistillationTrainer(student, teacher, train_dataset=ROWS)
    trainer.args.max_steps = 1
    trainer.train()
    assert trainer.objective == ForwardKL()
    assert trainer.args.output_dir == "student-distillation"
    assert (tmp_path / "student-distillation" / "metrics.jsonl").is_file()


def test_strings_and_objects_train_alike(tmp_path: Path, student: str, teacher: str) -> None:
    given: list[dict[str, Any]] = [
        {"model": student, "teacher": teacher, "processing_class": None},
        {"model": tiny_llama(V), "teacher": tiny_llama(V, seed=1)},
        {"model": student, "teacher": HFTeacher(teacher)},
    ]
    found = []
    for arguments in given:
        trainer = trainer_of(tmp_path, config={"max_steps": 3}, **arguments)
        trainer.train()
        found.append(logged(trainer))
    assert found[0] == found[1] == found[2]


def test_a_cache_directory_is_a_teacher(tmp_path: Path, teacher: str, student: str) -> None:
    rows = trainer_of(tmp_path).train_dataset
    write_cache(
        HFTeacher(teacher),
        rows,
        directory=tmp_path / "cache",
        tokenizer=tiny_tokenizer(),
        teacher_name=teacher,
        k=8,
    )
    trainer = trainer_of(tmp_path, model=student, teacher=str(tmp_path / "cache"))
    assert isinstance(trainer.teacher, CachedTeacher)


MESSAGES = [{"role": "user", "content": "Is the sky blue?"}, {"role": "assistant", "content": "Yes, it is."}]


def prepared() -> Dataset:
    ids = [[1, 20, 30, 40, 50], [1, 60, 70]]
    return Dataset.from_dict({"input_ids": ids, "labels": [[-100, *row[1:]] for row in ids], "sample_id": [7, 8]})


@pytest.mark.parametrize(
    ("rows", "scored"),
    [
        (ROWS, None),
        (Dataset.from_list(ROWS), None),
        ([{"prompt": "Is the sky blue?", "completion": " Yes."}] * 4, None),
        ([{"messages": MESSAGES}] * 4, None),
        ([{"input_ids": [1, 20, 30, 40], "labels": [-100, -100, 30, 40]}] * 4, 8),
        (prepared(), 6),
    ],
)
def test_every_kind_of_rows_trains(tmp_path: Path, rows: Any, scored: int | None) -> None:
    trainer = trainer_of(tmp_path, rows=rows)
    trainer.train()
    counted = sum(x != -100 for row in trainer.train_dataset for x in row["labels"][1:])
    if len(trainer.train_dataset) <= 4:
        assert logged(trainer, "scored_tokens") == [counted]
        assert scored is None or scored == counted
    assert logged(trainer)[0] > 0.0


def test_rows_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS[:5]))
    assert (
        trainer_of(tmp_path, rows=str(path)).train_dataset.to_list()
        == trainer_of(tmp_path, rows=ROWS[:5]).train_dataset.to_list()
    )


def test_a_new_student_from_a_configuration(tmp_path: Path, student: str, teacher: str) -> None:
    config = {"from_scratch": True, "config_overrides": {"hidden_size": 16, "num_hidden_layers": 1}}
    made = [trainer_of(tmp_path, model=student, teacher=teacher, config=config) for _ in range(2)]
    shapes = {tuple(p.shape) for p in made[0].model.parameters()}
    assert (V, 16) in shapes and (V, 32) not in shapes
    for a, b in zip(made[0].model.parameters(), made[1].model.parameters(), strict=True):
        assert torch.equal(a, b), "the seed decides the new weights"


def test_disable_dropout(tmp_path: Path) -> None:
    model = tiny_llama(V)
    model.model.layers[0].mlp.down_proj = torch.nn.Sequential(model.model.layers[0].mlp.down_proj, torch.nn.Dropout(0.5))
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.5  # which attention hands to a function
    trainer = trainer_of(tmp_path, model=model, config={"disable_dropout": True})
    assert [m.p for m in trainer.model.modules() if isinstance(m, torch.nn.Dropout)] == [0.0]
    assert {layer.self_attn.attention_dropout for layer in trainer.model.model.layers} == {0.0}


def renamed_tokens() -> Any:
    """A tokenizer of the same size that gives two of its ids to each other's tokens."""
    made = tiny_tokenizer()
    content = json.loads(made.backend_tokenizer.to_str())
    vocab = content["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
    made._tokenizer = type(made.backend_tokenizer).from_str(json.dumps(content))
    return made


def test_another_tokenizer_is_refused_with_the_trainer_that_takes_it(tmp_path: Path, student: str) -> None:
    other = saved(tmp_path / "other", tiny_llama(V, seed=1), renamed_tokens())
    with pytest.raises(ValueError, match=r"different tokenizers.*CrossTokenizerTrainer"):
        trainer_of(tmp_path / "run", model=student, teacher=other)


def cached(directory: Path, tokenizer: Any = None, **options: Any) -> str:
    rows = trainer_of(directory).train_dataset
    teacher, name = HFTeacher(tiny_llama(V, seed=1)), directory / "cache"
    given = {"k": 8, "tokenizer": tokenizer or tiny_tokenizer(), "teacher_name": "tiny", **options}
    write_cache(teacher, rows, directory=name, **given)
    return str(name)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"teacher": None}, r"ForwardKL needs a teacher"),
        ({"teacher": "http://127.0.0.1:9/v1"}, "vllm serve"),
        ({"objective": "ForwardKL"}, r"objective must be a kdlib.objectives.Objective, not str"),
        ({"model": "no/such/directory/student"}, "the directory does not exist"),
        ({"teacher": "no/such/directory/teacher"}, "the directory does not exist"),
        ({"processing_class": None}, "no tokenizer beside it: give processing_class"),
        (
            {"rows": [{"input_ids": [1, V + 3], "labels": [1, V + 3]}]},
            f"token id {V + 3}, the tokenizer has {V}",
        ),
        ({"eval_dataset": [{"input_ids": [1, V], "labels": [1, V]}]}, f"token id {V}, the tokenizer has {V}"),
        ({"rows": [{"question": "a", "answer": "b"}]}, "the dataset has the columns answer, question"),
        ({"rows": []}, "empty"),
        (
            {"quantization_config": BitsAndBytesConfig(load_in_4bit=True)},
            r"cannot be trained whole: add an adapter",
        ),
    ],
)
def test_what_does_not_fit_is_one_line(tmp_path: Path, given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        trainer_of(tmp_path, **given)
    assert "\n" not in str(error.value)
    assert not list(tmp_path.iterdir()), "nothing is written before everything fits"


def test_a_cache_that_cannot_feed_the_objective_is_refused_by_name(tmp_path: Path) -> None:
    drawn = cached(tmp_path, kind="sampled")
    with pytest.raises(ValueError, match=r"CachedTeacher provides .*SAMPLED_TEACHER.*cannot feed ReverseKL"):
        trainer_of(tmp_path, teacher=drawn, objective=ReverseKL())


def test_a_cache_of_other_rows_or_another_temperature_is_refused(tmp_path: Path) -> None:
    cache = cached(tmp_path)
    with pytest.raises(ValueError, match="cache"):
        trainer_of(tmp_path, teacher=cache, rows=[{"text": "Rows that it has never seen."}])
    for objective in (
        ForwardKL(temperature=2.0),
        Sum(parts=((1.0, ForwardKL(temperature=2.0)), (1.0, CrossEntropy()))),
    ):
        with pytest.raises(ValueError, match=r"temperature 2\.0, the teacher's log-probs are at 1\.0"):
            trainer_of(tmp_path, teacher=cache, objective=objective)


def test_a_cache_of_another_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="tokenizer"):
        trainer_of(tmp_path, teacher=cached(tmp_path, renamed_tokens()))


def test_several_gpus_in_one_process_are_refused(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path)
    trainer.args._n_gpu = 2
    with pytest.raises(ValueError, match="DataParallel"):
        setup.check_parallelism(trainer.args, trainer.accelerator, trainer.teacher)


def test_resuming_where_there_is_nothing_to_resume(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no complete checkpoint"):
        trainer_of(tmp_path).train(resume_from_checkpoint=True)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"max_length": 1}, "max_length must be at least 2"),
        ({"config_overrides": {"hidden_size": 8}}, "from_scratch"),
        ({"torch_compile": True}, "torch_compile is not supported"),
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor"),
        ({"use_liger_kernel": True}, "use_liger_kernel"),
    ],
)
def test_options_that_would_do_nothing_or_harm(tmp_path: Path, option: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        settings(tmp_path, **option)


def test_objectives_on_a_top_k_cache(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, teacher=cached(tmp_path), objective=DecoupledTopK(k=4))
    trainer.train()
    assert len(logged(trainer)) == 1


def test_a_teacher_beside_a_loss_that_needs_none_is_not_run(tmp_path: Path) -> None:
    teacher = HFTeacher(tiny_llama(V, seed=1))
    trainer = trainer_of(tmp_path, teacher=teacher, objective=CrossEntropy())
    trainer.train()
    line = trainer.state.log_history[0]
    assert "kl_forward" not in line and "entropy_student" in line
    assert len(TEXTS) == len(trainer.train_dataset)
