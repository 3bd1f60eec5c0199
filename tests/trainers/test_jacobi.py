"""Consistency training against a loop over single blocks, in float64."""

from __future__ import annotations

import copy
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, MptConfig, MptForCausalLM, TrainerCallback

from kdlib.objectives import CrossEntropy, ForwardKL, GeneralizedJSD, ReverseKL, SampledReverseKL
from kdlib.samplers import RolloutConfig
from kdlib.teachers import EnsembleTeacher, HFTeacher, SelfTeacher
from kdlib.trainers import JacobiConfig, JacobiTrainer
from tests.tiny import tiny_llama, tiny_tokenizer
from tests.trainers.jacobi_plain import (
    N,
    Pick,
    Trajectory,
    double,
    jacobi_trainer,
    nearest,
    plain_ar,
    plain_consistency,
    trajectories,
)
from tests.trainers.small import (
    Gradients,
    V,
    cross_entropy,
    forward_kl,
    logged,
    plain_gradients,
    reverse_kl,
    saved,
    settings_of,
)

ROWS = trajectories()
THREE = trajectories(seed=1, states=3, drop=0.2)  # three states of most blocks, some blocks left out
NOISIEST = {"schedule": "progressive", "min_noise": 1.0, "max_noise": 1.0}  # one state and no other
FORCING = {"schedule": "progressive", "context": "noisy", "window_size": 2, "min_noise": 0.4}


def jsd(p: Tensor, q: Tensor, labels: Tensor) -> Tensor:
    m = (0.3 * p.exp() + 0.7 * q.exp()).log()
    return 0.3 * (p.exp() * (p - m)).sum(-1) + 0.7 * (q.exp() * (q - m)).sum(-1)


def noisiest(row: Trajectory) -> Pick:
    return nearest(lambda number: 1.0, row.text)


def rising(row: Trajectory, *, window: int = 2) -> Pick:
    return nearest(lambda number: 0.4 + 0.6 * (number % window) / (window - 1), row.text)


def one_step(directory: Path, rows: Any, **given: Any) -> tuple[JacobiTrainer, dict[str, Tensor]]:
    gradients = Gradients()
    trainer = jacobi_trainer(directory, rows, callbacks=[gradients], **given)
    trainer.train()
    return trainer, gradients.steps[0]


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor], *, tolerance: float = 1e-6) -> None:
    """Llama's norms are float32 whatever the weights are, which gradients of one large pass and of many small ones show."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(
            found[name], value, rtol=tolerance, atol=tolerance, msg=lambda text, name=name: f"{name}: {text}"
        )


def assert_step(
    trainer: JacobiTrainer,
    found: dict[str, Tensor],
    student: nn.Module,
    *,
    consistency: Tensor,
    ar: Tensor,
    weight: float = 1.0,
) -> None:
    """The step's loss and gradients are those of the plain computation."""
    total = consistency + weight * ar
    assert consistency.item() > 1e-3, "it must have something to teach"
    assert logged(trainer) == [pytest.approx(total.item(), rel=1e-6)]
    assert logged(trainer, "ar/cross_entropy") == [pytest.approx(ar.item(), rel=1e-6)]
    assert_same(found, plain_gradients(student, total))


# One step against one pass for each block


@pytest.mark.parametrize(
    ("objective", "plain"),
    [(ForwardKL(), forward_kl), (ReverseKL(), reverse_kl), (GeneralizedJSD(beta=0.3), jsd), (CrossEntropy(), cross_entropy)],
)
def test_global_consistency_is_that_of_single_blocks(tmp_path: Path, objective: Any, plain: Any) -> None:
    trainer, found = one_step(tmp_path, ROWS, objective=objective)
    student = double()
    consistency = plain_consistency(student, ROWS, plain)
    assert_step(trainer, found, student, consistency=consistency, ar=plain_ar(student, ROWS))


def test_without_arguments_it_is_forward_kl_to_the_student_itself(tmp_path: Path) -> None:
    trainer = jacobi_trainer(tmp_path, ROWS)
    assert trainer.objective == ForwardKL()
    assert isinstance(trainer.teacher, SelfTeacher) and trainer.teacher.kind == "student"
    assert trainer.state_source == "stored"


def test_local_consistency_teaches_the_next_state(tmp_path: Path) -> None:
    trainer, found = one_step(tmp_path, THREE, config={"consistency": "local", **NOISIEST})
    student = double()
    consistency = plain_consistency(student, THREE, forward_kl, pick=noisiest, local=True)
    on_text = plain_consistency(student, THREE, forward_kl, pick=noisiest)
    assert abs(consistency.item() - on_text.item()) > 1e-3
    assert_step(trainer, found, student, consistency=consistency, ar=plain_ar(student, THREE))


def test_where_the_next_state_is_the_text_local_is_global(tmp_path: Path) -> None:
    _, found = one_step(tmp_path, ROWS, config={"consistency": "local"})
    _, expected = one_step(tmp_path, ROWS)
    assert_same(found, expected)


@pytest.mark.parametrize("window", [2, 3])
def test_jacobi_forcing_reads_noisy_blocks_before_a_block(tmp_path: Path, window: int) -> None:
    trainer, found = one_step(tmp_path, THREE, config={**FORCING, "window_size": window})
    student = double()

    def pick(row: Trajectory) -> Pick:
        return rising(row, window=window)

    consistency = plain_consistency(student, THREE, forward_kl, pick=pick, window=window)
    on_clean = plain_consistency(student, THREE, forward_kl, pick=pick)
    assert abs(consistency.item() - on_clean.item()) > 1e-3
    assert_step(trainer, found, student, consistency=consistency, ar=plain_ar(student, THREE))


def test_a_schedule_with_clean_context(tmp_path: Path) -> None:
    trainer, found = one_step(tmp_path, THREE, config={**FORCING, "context": "clean"})
    student = double()
    consistency = plain_consistency(student, THREE, forward_kl, pick=rising)
    assert_step(trainer, found, student, consistency=consistency, ar=plain_ar(student, THREE))


def test_weights_are_those_of_the_terms(tmp_path: Path) -> None:
    trainer, found = one_step(tmp_path, ROWS, config={"ar_weight": 0.3, "consistency_weight": 2.0})
    student = double()
    consistency = 2.0 * plain_consistency(student, ROWS, forward_kl)
    assert_step(trainer, found, student, consistency=consistency, ar=plain_ar(student, ROWS), weight=0.3)


# Teachers


@pytest.mark.parametrize("options", [{}, {"consistency": "local", **NOISIEST}, FORCING])
@pytest.mark.parametrize("path", [False, True])
def test_a_frozen_teacher(tmp_path: Path, path: bool, options: dict[str, Any]) -> None:
    plain = double(1)
    teacher = saved(tmp_path / "teacher", double(1)) if path else double(1)
    trainer, found = one_step(tmp_path / "run", THREE, teacher=teacher, config={**NOISIEST, **options})
    student = double()
    how: dict[str, Any] = {"local": "consistency" in options, "window": 2 if options == FORCING else None}
    how["pick"] = rising if options == FORCING else noisiest
    consistency = plain_consistency(student, THREE, forward_kl, teacher=plain, **how)
    assert_step(trainer, found, student, consistency=consistency, ar=plain_ar(student, THREE))


class Weights(TrainerCallback):
    """The student as it is before every step."""

    def __init__(self) -> None:
        self.steps: list[dict[str, Tensor]] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        self.steps.append({name: x.clone() for name, x in given["model"].state_dict().items()})


@pytest.mark.parametrize("options", [{}, {"consistency": "local", **NOISIEST}])
def test_an_averaged_teacher(tmp_path: Path, options: dict[str, Any]) -> None:
    """In step 2 it is halfway between the student's two first weights."""
    rows, weights, gradients = (THREE if options else ROWS), Weights(), Gradients()
    teacher = SelfTeacher("ema", decay=0.5)
    config = {"max_steps": 2, "learning_rate": 0.05, "lr_scheduler_type": "constant", **options}
    trainer = jacobi_trainer(tmp_path, rows, teacher=teacher, config=config, callbacks=[weights, gradients])
    trainer.train()
    student, average = double(), double()
    student.load_state_dict(weights.steps[1])
    average.load_state_dict({name: 0.5 * (x + weights.steps[1][name]) for name, x in weights.steps[0].items()})
    how: dict[str, Any] = {"local": True, "pick": noisiest} if options else {}
    found = []
    for plain_teacher in (average, student):
        consistency = plain_consistency(student, rows, forward_kl, teacher=plain_teacher, **how)
        found.append((consistency + plain_ar(student, rows)).item())
    assert abs(found[0] - found[1]) > 1e-4
    assert logged(trainer)[1] == pytest.approx(found[0], rel=1e-5)  # averages are kept in float32
    consistency = plain_consistency(student, rows, forward_kl, teacher=average, **how)
    expected = plain_gradients(student, consistency + plain_ar(student, rows))
    assert_same(gradients.steps[1], expected, tolerance=1e-5)


def lora(**options: Any) -> LoraConfig:
    """B drawn at random, so that the adapter changes what the model says from the first step on."""
    given = {"target_modules": ["q_proj", "v_proj", "lm_head"], "r": 4, "lora_alpha": 8, "init_lora_weights": False, **options}
    return LoraConfig(task_type="CAUSAL_LM", **given)


@pytest.mark.parametrize("options", [{}, {"consistency": "local", **NOISIEST}])
@pytest.mark.parametrize("kind", ["student", "adapter_off"])
def test_lora(tmp_path: Path, kind: Any, options: dict[str, Any]) -> None:
    """The student's own distributions, or those of the model below its adapter."""
    rows, gradients = (THREE if options else ROWS), Gradients()
    trainer = jacobi_trainer(
        tmp_path, rows, teacher=SelfTeacher(kind), peft_config=lora(), callbacks=[gradients], config=options
    )
    student = copy.deepcopy(trainer.model)
    trainer.train()
    how: dict[str, Any] = {"local": True, "pick": noisiest} if options else {}
    below = double() if kind == "adapter_off" else student
    consistency = plain_consistency(student, rows, forward_kl, teacher=below, **how)
    assert_step(trainer, gradients.steps[0], student, consistency=consistency, ar=plain_ar(student, rows))
    assert all("lora_" in name for name in gradients.steps[0])


def test_lora_is_merged_into_what_is_published(tmp_path: Path) -> None:
    trainer = jacobi_trainer(tmp_path, ROWS, model=tiny_llama(V), peft_config=lora(), config={"max_steps": 3})
    trainer.train()
    assert isinstance(trainer.model, PeftModel)
    merged = AutoModelForCausalLM.from_pretrained(trainer.save_final(tmp_path / "final")).eval()
    ids = ROWS[0].ids
    with torch.no_grad():
        torch.testing.assert_close(
            merged(torch.tensor([ids])).logits, trainer.model.eval()(input_ids=torch.tensor([ids])).logits, rtol=1e-4, atol=1e-4
        )


# What may not matter


def shapes(rows: int) -> list[dict[str, int]]:
    return [{"per_device_train_batch_size": size, "gradient_accumulation_steps": rows // size} for size in (rows, rows // 4, 1)]


SOURCES: list[dict[str, Any]] = [
    {"state_source": "stored"},
    {"state_source": "stored", "states_per_block": 2, "blocks_per_row": 2},
    {"state_source": "stored", "consistency": "local"},
    {"state_source": "student", "init": "random"},
    {"state_source": "noise", "schedule": "random", "context": "noisy", "window_size": 2},
]


@pytest.mark.parametrize("options", SOURCES, ids=str)
def test_how_a_step_is_split_and_padded_does_not_matter(tmp_path: Path, options: dict[str, Any]) -> None:
    """Eight rows at once, in four and in eight micro-batches: the draws are the rows' own, the means the step's."""
    rows = trajectories(seed=2, lengths=(13, 8, 3, 10, 5, 11, 2, 9), states=4)
    expected: dict[str, Tensor] = {}
    for shape in shapes(len(rows)):
        trainer, found = one_step(tmp_path, rows, config={**options, **shape})
        expected = expected or found
        assert_same(found, expected)
        scored = logged(trainer, "scored_tokens")[0]
        assert scored > sum(len(row.completion) for row in rows), "both terms have rows"


def text_loss(directory: Path, block_size: int) -> tuple[float, dict[str, Tensor]]:
    rows = Dataset.from_list([row.row() for row in trajectories(seed=3, lengths=(16, 24, 8))])
    config = {"block_size": block_size, "state_source": "noise", "consistency_weight": 0.0}
    trainer, found = one_step(directory, rows, config=config)
    assert logged(trainer)[0] == pytest.approx(logged(trainer, "ar/cross_entropy")[0], rel=1e-6)
    return logged(trainer)[0], found


def test_the_text_weighs_the_same_however_many_blocks_there_are(tmp_path: Path) -> None:
    whole, expected = text_loss(tmp_path, 8)
    halves, found = text_loss(tmp_path, 4)
    assert halves == pytest.approx(whole, rel=1e-9)
    assert_same(found, expected)


@pytest.mark.parametrize("options", [{"state_source": "student"}, {"state_source": "noise"}, FORCING], ids=str)
def test_evaluation_does_not_depend_on_its_batch_size(tmp_path: Path, options: dict[str, Any]) -> None:
    rows = trajectories(seed=4, lengths=(7, 12, 5, 9, 3, 8, 6), states=3)
    found = []
    for size in (1, 3, 7):
        trainer = jacobi_trainer(
            tmp_path,
            rows,
            eval_dataset=Dataset.from_list([row.row() for row in rows]),
            config={**options, "per_device_eval_batch_size": size},
        )
        measured = trainer.evaluate()
        found.append([measured[key] for key in ("eval_loss", "eval_kl_forward", "eval_ar/cross_entropy")])
    assert found[1:] == [pytest.approx(found[0], rel=1e-9)] * 2
    assert found[0][2] == pytest.approx(plain_ar(double(), rows).item(), rel=1e-6)
    assert found[0][0] == pytest.approx(found[0][1] + found[0][2], rel=1e-6)


def test_evaluation_is_the_plain_loss(tmp_path: Path) -> None:
    dataset = Dataset.from_list([row.row() for row in ROWS])
    measured = jacobi_trainer(tmp_path, ROWS, eval_dataset=dataset).evaluate()
    student = double()
    expected = plain_consistency(student, ROWS, forward_kl) + plain_ar(student, ROWS)
    assert measured["eval_loss"] == pytest.approx(expected.item(), rel=1e-6)


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_changes_nothing(tmp_path: Path, reentrant: bool) -> None:
    _, expected = one_step(tmp_path, THREE, config=FORCING)
    options = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": reentrant}}
    _, found = one_step(tmp_path, THREE, config={**FORCING, **options})
    assert_same(found, expected, tolerance=1e-12)


@pytest.mark.parametrize("options", [{}, {"state_source": "student"}], ids=str)
def test_bf16_stays_close(tmp_path: Path, options: dict[str, Any]) -> None:
    found = []
    for bf16 in (False, True):
        trainer = jacobi_trainer(tmp_path, ROWS, model=tiny_llama(V), config={"bf16": bf16, "max_steps": 3, **options})
        trainer.train()
        found.append(torch.tensor(logged(trainer)))
    difference = (found[1] / found[0] - 1).abs()
    assert (difference > 1e-6).all(), "bf16 computed in float32"
    assert (difference < 5e-2).all()


# States of the student


@torch.no_grad()
def states_of(model: nn.Module, prefix: list[int], state: list[int]) -> list[list[int]]:
    """Jacobi iterations of one block after ``prefix``, until it no longer changes."""
    states = [state]
    while True:
        choice = model(input_ids=torch.tensor([prefix + states[-1]])).logits[0, :, :V].argmax(-1).tolist()
        following = [state[0], *choice[len(prefix) : -1]]
        if following == states[-1]:
            return states
        states.append(following)


def iterated(model: nn.Module, prompt: list[int], completion: list[int]) -> Trajectory:
    """All blocks from copies of the prompt on."""
    blocks = {}
    for number, start in enumerate(range(0, len(completion), N)):
        block = completion[start : start + N]
        guess = [block[0], *(prompt[p % len(prompt)] for p in range(start + 1, start + len(block)))]
        blocks[number] = states_of(model, prompt + completion[:start], guess)
    return Trajectory(prompt, completion, blocks, [])


def test_states_of_the_student_on_a_given_text(tmp_path: Path) -> None:
    """The text is none that it would write, so that its states do not end in it; they are those of each step's weights."""
    rows = [{key: row.row()[key] for key in ("input_ids", "labels", "sample_id")} for row in ROWS]
    weights, gradients = Weights(), Gradients()
    config = {**NOISIEST, "max_steps": 2, "learning_rate": 0.02, "lr_scheduler_type": "constant"}
    trainer = jacobi_trainer(tmp_path, Dataset.from_list(rows), config=config, callbacks=[weights, gradients])
    assert trainer.state_source == "student"
    trainer.train()
    for step in range(2):
        student = double()
        student.load_state_dict(weights.steps[step])
        own = [iterated(student, row.prompt, row.completion) for row in ROWS]
        consistency = plain_consistency(student, own, forward_kl, pick=noisiest)
        expected = consistency + plain_ar(student, own)
        assert logged(trainer)[step] == pytest.approx(expected.item(), rel=1e-6)
        assert_same(gradients.steps[step], plain_gradients(student, expected))


PROMPTS = [f"{'two plus ' * (1 + i % 3)}{i}" for i in range(4)]


def test_texts_of_the_student_are_renewed_with_their_states(tmp_path: Path) -> None:
    """on_policy_fraction 1 at temperature 0: the text is the student's own greedy one, where its states end."""
    tokenizer, length = tiny_tokenizer(), 10
    config = {"on_policy_fraction": 1.0, "max_completion_length": length, "rollout": RolloutConfig(temperature=0.0)}
    prompts = [{"prompt": prompt} for prompt in PROMPTS]
    weights, gradients = Weights(), Gradients()
    options = {**config, **NOISIEST, "max_steps": 2, "learning_rate": 0.01, "lr_scheduler_type": "constant"}
    trainer = JacobiTrainer(
        double(),
        args=settings_of(JacobiConfig, tmp_path, block_size=N, max_grad_norm=1e9, **options),
        train_dataset=prompts,
        processing_class=tokenizer,
        callbacks=[weights, gradients],
    )
    assert trainer.state_source == "student"
    trainer.train()
    drawn = []
    for step in range(2):
        student = double()
        student.load_state_dict(weights.steps[step])
        own = []
        for prompt in (tokenizer.encode(text) for text in PROMPTS):
            ids = torch.tensor([prompt])
            how = {"max_new_tokens": length, "do_sample": False, "pad_token_id": 0}
            text = student.generate(ids, attention_mask=torch.ones_like(ids), **how)[0, len(prompt) :].tolist()
            own.append(iterated(student, prompt, text))
            assert [states[-1] for states in own[-1].blocks.values()] == [own[-1].text(b) for b in own[-1].blocks]
        consistency = plain_consistency(student, own, forward_kl, pick=noisiest)
        expected = consistency + plain_ar(student, own)
        assert logged(trainer)[step] == pytest.approx(expected.item(), rel=1e-6)
        assert_same(gradients.steps[step], plain_gradients(student, expected))
        drawn.append([row.completion for row in own])
    assert drawn[0] != drawn[1], "the student must have changed to tell anything"


# Labels of the text


def with_reference(row: Trajectory, *, kept: int) -> Trajectory:
    """The first ``kept`` of 8 tokens as in the completion, the others as in no completion: a distance of 1 - kept / 8."""
    assert len(row.completion) == 8
    others = [token for token in range(3, V) if token not in row.completion]
    return Trajectory(row.prompt, row.completion, row.blocks, row.completion[:kept] + others[: 8 - kept])


@pytest.mark.parametrize(
    ("options", "replaced"),
    [
        ({"ar_labels": "trajectory"}, []),
        ({"ar_labels": "mixed", "max_distance": 0.5}, [0, 3]),
        ({"ar_labels": "mixed", "max_distance": 0.49}, [0, 2, 3]),
        ({"ar_labels": "mixed", "max_distance": 1.0}, []),
        ({"ar_labels": "dataset"}, [0, 1, 2, 3]),
    ],
    ids=str,
)
def test_labels_of_the_data_set_replace_a_text_that_is_too_far(
    tmp_path: Path, options: dict[str, Any], replaced: list[int]
) -> None:
    """Distances 1, 0.25, 0.5 and 0.625, and a row without a reference."""
    rows = trajectories(seed=5, lengths=(8, 8, 8, 8, 8))
    rows = [*(with_reference(row, kept=kept) for row, kept in zip(rows, (0, 6, 4, 3), strict=False)), rows[4]]
    rows[4] = Trajectory(rows[4].prompt, rows[4].completion, rows[4].blocks, [])
    trainer, found = one_step(tmp_path, rows, config=options)
    student = double()
    ar = plain_ar(student, rows, replaced=lambda row: rows.index(row) in replaced)
    assert_step(trainer, found, student, consistency=plain_consistency(student, rows, forward_kl), ar=ar)


def test_rows_with_nothing_wrong_have_no_consistency(tmp_path: Path) -> None:
    rows = trajectories(states=1)
    trainer, found = one_step(tmp_path, rows)
    student = double()
    expected = plain_ar(student, rows)
    assert logged(trainer) == [pytest.approx(expected.item(), rel=1e-6)]
    assert_same(found, plain_gradients(student, expected))


def test_of_a_conversation_the_last_answer_has_states_and_all_answers_are_learned(tmp_path: Path) -> None:
    turns = [(5, False), (3, True), (2, False), (6, True), (2, False)]
    rng = random.Random(0)
    flags = [scored for count, scored in turns for _ in range(count)]
    ids = [rng.randrange(3, V) for _ in flags]
    labels = [token if scored else -100 for token, scored in zip(ids, flags, strict=True)]
    rows = Dataset.from_list([{"input_ids": ids, "labels": labels, "sample_id": 1}])
    trainer, found = one_step(tmp_path, rows, config={"state_source": "student", **NOISIEST})
    student = double()
    last = iterated(student, ids[:10], ids[10:16])
    consistency = plain_consistency(student, [last], forward_kl, pick=noisiest)
    scored = torch.tensor(labels)[1:] != -100
    said = student(torch.tensor([ids])).logits[0, :-1][scored].log_softmax(-1)
    ar = -said.gather(1, torch.tensor(ids)[1:][scored][:, None]).mean()
    assert_step(trainer, found, student, consistency=consistency, ar=ar)


# Resuming


def weights_of(trainer: JacobiTrainer) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters()}


RESUMED: list[dict[str, Any]] = [
    {"state_source": "stored", "states_per_block": 2, "blocks_per_row": 2},
    {"state_source": "student", "init": "random", "attention_dropout": 0.2},
    {"state_source": "noise", "schedule": "random", "context": "noisy", "window_size": 3},
    {"state_source": "stored", "consistency": "local", "teacher": "ema"},
]


@pytest.mark.parametrize("options", RESUMED, ids=str)
def test_a_resumed_run_ends_with_the_same_bits(tmp_path: Path, options: dict[str, Any]) -> None:
    rows = trajectories(seed=6, lengths=(13, 8, 5, 10, 7, 9), states=4)
    given = dict(options)
    dropout = given.pop("attention_dropout", 0.0)
    config = {**given, "max_steps": 4, "per_device_train_batch_size": 2, "save_strategy": "steps", "save_steps": 2}
    kind = config.pop("teacher", "student")

    def trainer(name: str) -> JacobiTrainer:
        model = tiny_llama(V, attention_dropout=dropout)
        return jacobi_trainer(tmp_path / name, rows, model=model, teacher=SelfTeacher(kind), config=config)

    whole = trainer("whole")
    whole.train()
    resumed = trainer("whole")
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    for name, expected in weights_of(whole).items():
        assert torch.equal(weights_of(resumed)[name], expected), name
    assert logged(resumed)[-2:] == logged(whole)[-2:]
    assert len(set(logged(whole))) == 4


# Memory


class Logits(TorchDispatchMode):
    """The most rows of a tensor [rows, V] that any operation makes; V is no other size here."""

    rows = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, Tensor) and tensor.ndim > 1 and tensor.shape[-1] == V:
                self.rows = max(self.rows, tensor.numel() // V)
        return out


@pytest.mark.parametrize("states", [1, 4])
def test_logits_of_all_states_are_never_there_at_once(tmp_path: Path, states: int) -> None:
    """The largest [rows, V] is a chunk of the kernel, whatever the number of blocks."""
    rows = trajectories(seed=7, lengths=(160,) * 4, states=4)
    trainer = jacobi_trainer(tmp_path, rows, model=tiny_llama(V), config={"states_per_block": states})
    with Logits() as seen:
        trainer.train()
    consistency = logged(trainer, "scored_tokens")[0] - 4 * 160
    assert consistency > states * 250
    assert 0 < seen.rows <= 256


# Bad input


def refused(directory: Path, message: str, rows: Any = ROWS, *, config: dict[str, Any] | None = None, **given: Any) -> None:
    with pytest.raises(ValueError, match=message):
        jacobi_trainer(directory, rows, config=config, **given)
    assert not list(directory.iterdir())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"block_size": 1}, "block_size must be at least 2, not 1"),
        ({"window_size": 0}, "window_size must be at least 1"),
        ({"states_per_block": 0}, "states_per_block must be at least 1"),
        ({"blocks_per_row": 0}, "blocks_per_row must be at least 1"),
        ({"min_noise": 0.6, "max_noise": 0.5}, "0 <= min_noise <= max_noise <= 1"),
        ({"max_noise": 1.5}, "0 <= min_noise <= max_noise <= 1"),
        ({"min_noise": -0.1}, "0 <= min_noise <= max_noise <= 1"),
        ({"ar_weight": -1.0}, "ar_weight are 0 or more"),
        ({"consistency_weight": -1.0}, "consistency_weight and"),
        ({"max_distance": 1.5}, "max_distance is from 0 to 1"),
        ({"init": "zeros"}, "choose prompt, random, last"),
        ({"packing": True}, "packing puts samples into one row.*leave it out"),
        ({"context": "noisy", "consistency": "local"}, "leave out consistency local"),
        ({"context": "noisy", "blocks_per_row": 2}, "leave out .*blocks_per_row"),
        ({"context": "noisy", "states_per_block": 2}, "leave out .*states_per_block"),
        ({"on_policy_fraction": 0.5, "state_source": "stored"}, "use state_source student"),
        ({"on_policy_fraction": 0.5, "ar_labels": "mixed"}, "ar_labels trajectory"),
        ({"on_policy_fraction": 0.5, "rollout_source": "corrected"}, "use student or teacher"),
        ({"schedule": "linear"}, "schedule.*progressive"),
        ({"context": "both"}, "context.*noisy"),
        ({"consistency": "both"}, "consistency.*local"),
        ({"state_source": "disk"}, "state_source.*stored"),
        ({"ar_labels": "both"}, "ar_labels.*mixed"),
    ],
    ids=str,
)
def test_options_that_cannot_be(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        settings_of(JacobiConfig, tmp_path, **options)


def plain_rows() -> Dataset:
    return Dataset.from_list([{key: row.row()[key] for key in ("input_ids", "labels", "sample_id")} for row in ROWS])


def test_rows_that_lack_what_is_asked_for(tmp_path: Path) -> None:
    refused(
        tmp_path, "the rows have no states; make them with kdlib trajectories", plain_rows(), config={"state_source": "stored"}
    )
    refused(tmp_path, r"states are of block_size \[4\], not 8: set block_size to theirs", config={"block_size": 8})
    refused(tmp_path, "ar_labels mixed needs rows of kdlib trajectories", plain_rows(), config={"ar_labels": "mixed"})


def test_evaluation_rows_need_states_too(tmp_path: Path) -> None:
    refused(tmp_path, "evaluation rows have no states", eval_dataset=plain_rows())
    others = Dataset.from_list([row.row(n=3) for row in trajectories(n=3)])
    refused(tmp_path, r"evaluation rows' states are of block_size \[3\]", eval_dataset=others)


def test_teachers_and_objectives_that_do_not_fit(tmp_path: Path) -> None:
    two = EnsembleTeacher([HFTeacher(double(1)), HFTeacher(double(2))])
    refused(tmp_path, "consistency needs whole distributions on the text as it is", teacher=two)
    refused(tmp_path, "NotARow is no row objective", objective=NotARow())
    refused(tmp_path, "SampledReverseKL learns from tokens that were drawn", objective=SampledReverseKL())
    refused(tmp_path, "needs a student with an adapter", teacher=SelfTeacher("adapter_off"))


class NotARow:
    """An objective on whole signals."""

    accepts, layers = None, ()

    def __call__(self, student: Any, teacher: Any) -> Any:
        raise AssertionError


def test_models_that_cannot_read_streams_are_refused_before_training(tmp_path: Path) -> None:
    flash = double()
    flash.config._attn_implementation = "flash_attention_2"
    refused(tmp_path, "need attn_implementation sdpa, eager or flex_attention", model=flash)
    sizes = {"vocab_size": V, "d_model": 32, "n_layers": 2, "n_heads": 4, "initializer_range": 0.2}
    alibi = MptForCausalLM(MptConfig(**sizes))
    refused(tmp_path, "the student .MptForCausalLM. does not place tokens by position_ids", model=alibi)
    options = {"consistency": "local"}
    refused(tmp_path, "the teacher .MptForCausalLM. does not place", teacher=MptForCausalLM(MptConfig(**sizes)), config=options)
