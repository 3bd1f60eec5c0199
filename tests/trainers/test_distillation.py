"""The trainer's steps against plain computations on whole logits, in float64 where that tells more."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Trainer, TrainerCallback, TrainingArguments

from kdlib.data import DistillationCollator
from kdlib.data.positions import causal_positions
from kdlib.head import Head
from kdlib.models import hidden_states
from kdlib.objectives import CrossEntropy, ForwardKL, ReverseKL, Sum
from kdlib.teachers import CachedTeacher, HFTeacher
from kdlib.teachers.write_cache import write_cache
from kdlib.trainers import DistillationTrainer
from kdlib.types import Loss, Positions, StudentSignal
from tests.tiny import tiny_llama, tiny_tokenizer
from tests.trainers.small import (
    ROWS,
    Gradients,
    V,
    cross_entropy,
    forward_kl,
    half_and_half,
    logged,
    plain_gradients,
    plain_loss,
    reverse_kl,
    settings,
    trainer_of,
)

HALVES = Sum(parts=((0.5, ForwardKL()), (0.5, CrossEntropy())))


def double(seed: int = 0, vocab_size: int = V, **config: Any) -> Any:
    return tiny_llama(vocab_size, seed=seed, **config).double()


def step_of_eight(directory: Path, *, rows: Any = ROWS[:8], **given: Any) -> tuple[DistillationTrainer, dict[str, Tensor]]:
    """One optimizer step over all eight rows in float64, and its gradients."""
    gradients = Gradients()
    config = {"per_device_train_batch_size": 8, "max_grad_norm": 1e9} | given.pop("config", {})
    trainer = trainer_of(
        directory,
        rows=rows,
        callbacks=[gradients],
        config=config,
        **{"model": double(), "teacher": double(1), **given},
    )
    trainer.train()
    return trainer, gradients.steps[0]


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor], *, tolerance: float) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=tolerance, atol=tolerance, msg=name)


@pytest.mark.parametrize(
    ("objective", "plain"),
    [
        (ForwardKL(), forward_kl),
        (ReverseKL(), reverse_kl),
        (CrossEntropy(), cross_entropy),
        (HALVES, half_and_half),
    ],
)
def test_a_step_is_the_mean_over_all_its_scored_tokens(tmp_path: Path, objective: Any, plain: Any) -> None:
    teacher = None if objective == CrossEntropy() else double(1)
    shape = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}
    trainer, found = step_of_eight(tmp_path, objective=objective, teacher=teacher, config=shape)
    student = double()
    expected = plain_loss(student, teacher, trainer.train_dataset, plain)
    assert logged(trainer) == [pytest.approx(expected.item(), rel=1e-6)]
    assert_same(found, plain_gradients(student, expected), tolerance=1e-9)


@pytest.mark.parametrize("config", [{"tie_word_embeddings": True}, {"attention_bias": True, "attn_implementation": "eager"}])
def test_students_of_other_shapes(tmp_path: Path, config: dict[str, Any]) -> None:
    trainer, found = step_of_eight(tmp_path, model=double(**config))
    student = double(**config)
    expected = plain_loss(student, double(1), trainer.train_dataset, forward_kl)
    assert logged(trainer) == [pytest.approx(expected.item(), rel=1e-6)]
    assert_same(found, plain_gradients(student, expected), tolerance=1e-6)  # eager attention has a float32 softmax


@pytest.mark.parametrize(("student_size", "teacher_size"), [(V, V + 40), (V + 40, V), (V + 8, V + 40)])
def test_padding_entries_of_either_vocabulary_take_no_part(tmp_path: Path, student_size: int, teacher_size: int) -> None:
    teacher = double(1, teacher_size)
    trainer, found = step_of_eight(tmp_path, model=double(0, student_size), teacher=teacher)
    student = double(0, student_size)
    expected = plain_loss(student, teacher, trainer.train_dataset, forward_kl)
    assert logged(trainer) == [pytest.approx(expected.item(), rel=1e-6)]
    assert_same(found, plain_gradients(student, expected), tolerance=1e-9)


def test_packed_rows_give_the_step_of_separate_ones(tmp_path: Path) -> None:
    apart, expected = step_of_eight(tmp_path)
    packed, found = step_of_eight(tmp_path, config={"packing": True, "max_length": 128})
    assert len(packed.train_dataset) < len(apart.train_dataset)
    assert logged(packed) == pytest.approx(logged(apart), rel=1e-9)
    assert logged(packed, "scored_tokens") == logged(apart, "scored_tokens")
    assert_same(found, expected, tolerance=1e-9)


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_changes_nothing(tmp_path: Path, reentrant: bool) -> None:
    plain, expected = step_of_eight(tmp_path)
    options = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": reentrant}}
    trainer, found = step_of_eight(tmp_path, config=options)
    assert logged(trainer) == logged(plain)
    assert_same(found, expected, tolerance=1e-12)


def test_without_a_teacher_it_is_plain_fine_tuning(tmp_path: Path) -> None:
    """The trajectory of transformers' own Trainer on the same rows, with accumulation."""
    options = {"max_steps": 6, "per_device_train_batch_size": 3, "gradient_accumulation_steps": 2}
    ours = trainer_of(tmp_path, teacher=None, objective=CrossEntropy(), config=options)
    collator = DistillationCollator(0)

    def collate(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        batch = collator(rows)
        return {name: batch[name] for name in ("input_ids", "attention_mask", "labels")}

    args = TrainingArguments(**{**_shared(settings(tmp_path, **options)), "remove_unused_columns": False})
    theirs = Trainer(tiny_llama(V), args, data_collator=collate, train_dataset=ours.train_dataset)
    ours.train()
    theirs.train()
    assert len(set(logged(ours))) == 6
    assert logged(ours) == pytest.approx(logged(theirs), rel=1e-5)  # type: ignore[arg-type]
    assert logged(ours, "grad_norm") == pytest.approx(logged(theirs, "grad_norm"), rel=1e-4)  # type: ignore[arg-type]


def _shared(args: Any) -> dict[str, Any]:
    names = (
        "output_dir",
        "use_cpu",
        "per_device_train_batch_size",
        "gradient_accumulation_steps",
        "max_steps",
        "seed",
    )
    more = (
        "logging_steps",
        "learning_rate",
        "lr_scheduler_type",
        "save_strategy",
        "disable_tqdm",
        "report_to",
    )
    return {name: getattr(args, name) for name in names + more}


@pytest.mark.parametrize("objective", [ForwardKL(), HALVES])
def test_evaluation_does_not_depend_on_its_batch_size(tmp_path: Path, objective: Any) -> None:
    found = []
    for size in (1, 3, 8):
        config = {"per_device_eval_batch_size": size}
        trainer = trainer_of(
            tmp_path,
            objective=objective,
            eval_dataset=ROWS[:7],
            config=config,
            model=double(),
            teacher=double(1),
        )
        found.append({key: value for key, value in trainer.evaluate().items() if not _timed(key)})
    plain = {ForwardKL(): forward_kl, HALVES: half_and_half}[objective]
    expected = plain_loss(double(), double(1), trainer.eval_dataset, plain)
    assert {"eval_loss", "eval_kl_forward", "eval_kl_reverse", "eval_top1_agreement"} <= found[0].keys()
    assert found[0]["eval_loss"] == pytest.approx(expected.item(), rel=1e-9)
    for other in found[1:]:
        assert other == pytest.approx(found[0], rel=1e-9)


def _timed(key: str) -> bool:
    return key.endswith(("runtime", "per_second", "preparation_time"))


def test_evaluation_during_training_leaves_the_trajectory_alone(tmp_path: Path) -> None:
    dropout = {"attention_dropout": 0.2}
    plain = trainer_of(tmp_path, model=tiny_llama(V, **dropout), config={"max_steps": 4})
    plain.train()
    watched = trainer_of(
        tmp_path,
        model=tiny_llama(V, **dropout),
        eval_dataset=ROWS[:5],
        config={"max_steps": 4, "eval_strategy": "steps", "eval_steps": 1},
    )
    watched.train()
    assert logged(watched) == logged(plain)
    assert len(logged(watched, "eval_loss")) == 4
    assert logged(watched, "kl_forward") == pytest.approx(logged(plain), rel=1e-6)  # the step's own rows, none of eval's


class SeenByHead(TrainerCallback):
    """The dtype that leaves the student's last norm."""

    def __init__(self) -> None:
        self.dtypes: set[torch.dtype] = set()

    def on_train_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        final = given["model"].model.layers[-1].mlp.down_proj
        final.register_forward_hook(lambda module, inputs, output: self.dtypes.add(output.dtype))


def test_bf16_computes_in_bf16_and_sums_in_float32(tmp_path: Path) -> None:
    found = {}
    for bf16 in (False, True):
        seen = SeenByHead()
        trainer = trainer_of(tmp_path, callbacks=[seen], config={"bf16": bf16, "max_steps": 3})
        made: list[torch.dtype] = []
        original = trainer.loss_of

        def recording(student: StudentSignal, teacher: Any, original: Any = original, made: Any = made) -> Loss:
            loss = original(student, teacher)
            made.append(loss.sum.dtype)
            return loss

        trainer.loss_of = recording  # type: ignore[method-assign]
        trainer.train()
        assert seen.dtypes == {torch.bfloat16 if bf16 else torch.float32}
        assert set(made) == {torch.float32}
        assert {p.dtype for p in trainer.model.parameters()} == {torch.float32}
        found[bf16] = torch.tensor(logged(trainer))
    relative = ((found[True] - found[False]) / found[False]).abs()
    assert (relative > 1e-6).all(), "bf16 computed in float32"
    assert (relative < 3e-2).all()


def test_a_cache_of_the_whole_vocabulary_trains_like_its_teacher(tmp_path: Path) -> None:
    live = trainer_of(tmp_path / "live", config={"max_steps": 5})
    tokenizer = tiny_tokenizer()
    write_cache(
        HFTeacher(tiny_llama(V, seed=1)),
        live.train_dataset,
        directory=tmp_path / "cache",
        tokenizer=tokenizer,
        teacher_name="tiny",
        k=V,
    )
    cached = trainer_of(tmp_path / "cached", teacher=str(tmp_path / "cache"), config={"max_steps": 5})
    assert isinstance(cached.teacher, CachedTeacher)
    live.train()
    cached.train()
    assert logged(cached) == pytest.approx(logged(live), rel=1e-3)
    assert logged(cached, "kl_reverse") == pytest.approx(logged(live, "kl_reverse"), rel=1e-2)


class TwoTerms(DistillationTrainer):
    """Cross-entropy on every second scored position beside the divergence on all of them."""

    def positions(self, batch: dict[str, Any]) -> dict[str, Positions]:
        every = causal_positions(batch)
        half = every.labels % 2 == 0
        return {
            "distill": every,
            "even": Positions(index=every.index[half], labels=every.labels[half], sequence=every.sequence[half]),
        }

    def terms(self, model: Any, batch: dict[str, Any], signals: Any) -> dict[str, Loss]:
        hidden, _ = hidden_states(model, batch)
        head, flat = Head.of(model, vocab_size=self.vocab_size), hidden.flatten(0, 1)

        def student(where: Positions) -> StudentSignal:
            return StudentSignal(hidden=flat[where.index], head=head, positions=where)

        every, even = batch["positions"]["distill"], batch["positions"]["even"]
        return {
            "distill": self.loss_of(student(every), signals["distill"]),
            "even": CrossEntropy()(student(even), None),
        }

    def term_weight(self, term: str) -> float:
        return {"distill": 1.0, "even": 0.25}[term]


def test_named_terms_are_means_over_their_own_rows(tmp_path: Path) -> None:
    """1 * sum_1 / N_1 + 0.25 * sum_2 / N_2, however the eight rows are split into micro-batches."""
    found = []
    for batch in (8, 2, 3):
        gradients = Gradients()
        shape = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": -(-8 // batch)}
        trainer = TwoTerms(
            double(),
            double(1),
            args=settings(tmp_path, max_grad_norm=1e9, **shape),
            train_dataset=ROWS[:8],
            eval_dataset=ROWS[:8],
            processing_class=tiny_tokenizer(),
            callbacks=[gradients],
        )
        found.append(trainer.evaluate()["eval_loss"])
        trainer.train()
        found += logged(trainer)
        student, rows = double(), trainer.train_dataset
        every = plain_loss(student, double(1), rows, forward_kl)
        even = plain_loss(student, None, _even(rows), cross_entropy)
        assert_same(gradients.steps[0], plain_gradients(student, every + 0.25 * even), tolerance=1e-6)
    assert found == pytest.approx([(every + 0.25 * even).item()] * 6, rel=1e-6)


def _even(rows: Any) -> list[dict[str, list[int]]]:
    return [{**row, "labels": [x if x % 2 == 0 else -100 for x in row["labels"]]} for row in rows]


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path: Path) -> None:
    student = tiny_llama(V)
    with torch.no_grad():
        student.lm_head.weight[5] = torch.nan
    trainer = trainer_of(tmp_path, model=student, config={"max_steps": 3})
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(ValueError, match=r"the loss is nan at step 1: lower learning_rate"):
        trainer.train()
    assert signal.getsignal(signal.SIGINT) is before
