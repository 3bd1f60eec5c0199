"""CrossTokenizerTrainer's steps against a loop over single rows in float64; what may not matter; rollouts; what is kept."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from kdlib.data import DistillationCollator
from kdlib.data.aligned import AlignedCollator
from kdlib.objectives.cross import ALM, ULD, DualSpace, HybridULD, MultiLevelOT, ProjectedKL
from kdlib.samplers import RolloutConfig
from kdlib.teachers import HFTeacher
from kdlib.trainers.callbacks import STATE_FILE
from kdlib.trainers.cross_tokenizer import alignment_metrics
from kdlib.trainers.final import MODULES
from kdlib.types import Completion, Positions, SamplingParams, TeacherSignal
from tests.tiny import tiny_llama, tiny_tokenizer
from tests.trainers.cross_plain import (
    PAIRS,
    TEXT_ROWS,
    Side,
    W,
    answered,
    cross_trainer,
    is_special,
    other_model,
    plain,
    rows_of,
    speaking,
    spelled,
    teachers_tokenizer,
    tiny_tokenizer_,
)
from tests.trainers.small import Gradients, V, assert_same, double, logged, lora, plain_gradients, saved, weights_of
from tests.trainers.test_on_policy import greedy

SHARP = ALM(temperature=4.0, weight=2.0, cross_entropy=0.5)
HIDDEN = replace(SHARP, hidden=0.5)
OBJECTIVES = {
    "alm": SHARP,
    "hidden": HIDDEN,
    "balanced": replace(HIDDEN, balance="gradient"),
    "hybrid": HybridULD(balance="gradient"),
    "uld": ULD(),
    "transport": MultiLevelOT(),
    "dual": DualSpace(),
    "dual_chunks": DualSpace(alignment="chunks"),
    "projected": ProjectedKL(),
}


def one_step(directory: Path, objective: Any, **given: Any) -> tuple[Any, dict[str, Tensor]]:
    """(the trainer after its steps, the gradients of the last one)."""
    gradients = Gradients()
    trainer = cross_trainer(directory, objective, callbacks=[gradients], **given)
    trainer.train()
    return trainer, gradients.steps[-1]


# A step


@pytest.mark.parametrize(
    "objective",
    [
        SHARP,
        replace(SHARP, debias=False, threshold=0.0),
        replace(SHARP, debias=False, threshold=0.2, temperature=30.0),
        replace(SHARP, threshold=0.0, divergence="total_variation", temperature=20.0),
        replace(SHARP, cross_entropy=0.0),
        ULD(),
        ULD(weight=0.7, cross_entropy=2.0),
        HybridULD(),
        HybridULD(beta=0.2, cross_entropy=0.0),
    ],
    ids=str,
)
def test_a_step_is_that_of_a_loop_over_rows(tmp_path: Path, objective: Any) -> None:
    trainer, found = one_step(tmp_path, objective)
    student = double()
    expected = plain(student, other_model(), PAIRS[:8], objective)
    assert logged(trainer) == [pytest.approx(expected.loss().item(), rel=1e-6)]
    assert_same(found, plain_gradients(student, expected.loss()), tolerance=1e-7)
    if objective.cross_entropy:
        assert abs(expected.mean("distill").item()) > 1e-2, "else the distillation term shows in nothing"
    chunked = sum(len(mine) for row in expected.chunks for mine, _ in row) / expected.counts["cross_entropy"]
    assert logged(trainer, "alignment/chunked_ratio") == [pytest.approx(chunked)]
    assert logged(trainer, "alignment/unread_ratio") == [0.0]


@pytest.mark.parametrize("objective", [SHARP, HybridULD()], ids=["alm", "hybrid"])
def test_rows_that_are_scored_from_their_second_token(tmp_path: Path, objective: Any) -> None:
    trainer, found = one_step(tmp_path, objective, rows=rows_of("texts", 0, 8))
    student = double()
    expected = plain(student, other_model(), TEXT_ROWS[:8], objective).loss()
    assert logged(trainer) == [pytest.approx(expected.item(), rel=1e-6)]
    assert_same(found, plain_gradients(student, expected), tolerance=1e-7)


def test_hidden_states_are_projected_by_what_is_trained(tmp_path: Path) -> None:
    trainer, found = one_step(tmp_path, HIDDEN)
    student = double()
    projection = HIDDEN.build_modules(student_width=32, teacher_width=24, seed=trainer.args.seed).weight.double()
    projection = projection.detach().requires_grad_()
    expected = plain(student, other_model(), PAIRS[:8], HIDDEN, projection=projection)
    assert logged(trainer) == [pytest.approx(expected.loss().item(), rel=1e-6)]
    wanted = torch.autograd.grad(expected.loss(), projection, retain_graph=True)[0]
    torch.testing.assert_close(found.pop(f"{MODULES}.weight"), wanted, rtol=1e-7, atol=1e-7)
    assert_same(found, plain_gradients(student, expected.loss()), tolerance=1e-7)
    assert expected.mean("hidden").item() > 0.1 and wanted.abs().max() > 1e-3


@pytest.mark.parametrize("objective", [SHARP, HybridULD()], ids=["alm", "hybrid"])
def test_an_adapter_gets_the_gradient_of_autograd(tmp_path: Path, objective: Any) -> None:
    gradients = Gradients()
    trainer = cross_trainer(tmp_path, objective, callbacks=[gradients], peft_config=lora())
    student = copy.deepcopy(trainer.model)
    trainer.train()
    expected = plain(student.get_base_model(), other_model(), PAIRS[:8], objective).loss()
    assert logged(trainer) == [pytest.approx(expected.item(), rel=1e-6)]
    assert all("lora_" in name for name in gradients.steps[0])
    assert_same(gradients.steps[0], plain_gradients(student, expected), tolerance=1e-7)


# What may not matter


class Padded(AlignedCollator):
    """Both sides padded to widths of their own."""

    def _collated(self, reader: Any, rows: Any) -> dict[str, Any]:
        multiple = 64 if reader is self.student else 80
        return DistillationCollator(reader.tokenizer.pad_token_id, pad_to_multiple_of=multiple)(rows)


def padded(collator: AlignedCollator) -> AlignedCollator:
    return Padded(student=collator.student, teacher=collator.teacher, closing=collator.closing)


TWO_STEPS = {"max_steps": 2}
CUT = {**TWO_STEPS, "per_device_train_batch_size": 3, "gradient_accumulation_steps": 3}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_how_a_step_is_cut_padded_and_ordered_does_not_matter(tmp_path: Path, name: str) -> None:
    """All rows twice, so that the second step has the weights of a balance."""
    whole, expected = one_step(tmp_path, OBJECTIVES[name], config=TWO_STEPS)
    rows = rows_of("pairs", 0, 8)
    backwards = replace(rows, dataset=rows.dataset.select(range(7, -1, -1)))
    other, found = one_step(tmp_path, OBJECTIVES[name], rows=backwards, data_collator=padded(whole.data_collator), config=CUT)
    assert [len(batch["labels"]) for batch in other.batches] == [3, 3, 2, 3, 3, 2]
    assert other.batches[0]["labels"].shape[1] == 64 and other.batches[0]["other"]["labels"].shape[1] == 80
    for key in ("loss", "scored_tokens", "grad_norm"):
        assert logged(other, key) == pytest.approx(logged(whole, key), rel=1e-6), key
    assert_same(found, expected)
    assert logged(whole)[1] < logged(whole)[0]


def evaluated(trainer: Any) -> dict[str, float]:
    timed = ("runtime", "per_second", "preparation_time")
    return {key: value for key, value in trainer.evaluate().items() if not key.endswith(timed)}


@pytest.mark.parametrize("name", ["alm", "hidden", "hybrid", "dual", "transport"])
def test_evaluation_does_not_depend_on_the_batch_size(tmp_path: Path, name: str) -> None:
    """By batches of 7 and of 3, 3 and 1 rows."""
    found = []
    for size in (7, 3):
        given = {"eval_dataset": rows_of("pairs", 0, 7), "config": {"per_device_eval_batch_size": size}}
        trainer = cross_trainer(tmp_path, OBJECTIVES[name], **given)
        found.append(evaluated(trainer))
    assert found[1] == pytest.approx(found[0], rel=1e-7)
    if name in ("alm", "hybrid"):
        expected = plain(double(), other_model(), PAIRS[:7], OBJECTIVES[name]).loss().item()
        assert found[0]["eval_loss"] == pytest.approx(expected, rel=1e-9)


def test_rows_that_fill_a_batch_are_counted_nowhere(tmp_path: Path) -> None:
    """As accelerate repeats them for processes that would have too few: their labels are taken away."""
    trainer = cross_trainer(tmp_path, SHARP)
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(3)])
    two = trainer.data_collator([trainer.train_dataset[i] for i in range(2)])
    batch["labels"][2] = -100
    batch["unread"] = torch.tensor([True, False, True])
    batch["positions"], found = trainer.positions(batch), trainer.positions(two)
    for name in ("distill", "cross_entropy"):
        assert batch["positions"][name].denominator == found[name].denominator
    counted = {name: (float(total), count) for name, (total, count) in alignment_metrics(batch).items()}
    assert counted["alignment/unread_ratio"] == (1.0, 2)
    assert counted["alignment/chunked_ratio"][1] == len(found["cross_entropy"])


# Checkpoints and what is published

SAVING = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "save_total_limit": None, "learning_rate": 1e-2}
CONTINUED = {
    "balanced": {"objective": OBJECTIVES["balanced"]},
    "balanced_adapter": {"objective": replace(HIDDEN, balance="gradient"), "peft_config": lora()},
    "dual": {"objective": OBJECTIVES["dual"]},
    "dual_adapter": {"objective": OBJECTIVES["dual"], "peft_config": lora()},
}


@pytest.mark.parametrize("name", CONTINUED)
def test_a_resumed_run_ends_with_the_same_bits(tmp_path: Path, name: str) -> None:
    given = {**CONTINUED[name], "config": SAVING, "rows": rows_of("pairs", 0, 16)}
    whole, resumed = (cross_trainer(tmp_path / which, **given) for which in ("whole", "resumed"))
    before = weights_of(whole)
    whole.train()
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    found, expected = weights_of(resumed), weights_of(whole)
    assert any(MODULES in key for key in expected) and found.keys() == expected.keys()
    for key, value in expected.items():
        assert torch.equal(found[key], value), key
        if MODULES in key:
            assert not torch.equal(value, before[key]), "modules are trained"
    states = [json.loads((tmp_path / run / "checkpoint-4" / STATE_FILE).read_text()) for run in ("whole", "resumed")]
    assert states[0] == states[1] and bool(states[0]["objective"]) == ("balanced" in name)
    assert logged(resumed)[-2:] == logged(whole)[2:]


@pytest.mark.parametrize("given", [{}, {"peft_config": lora()}], ids=["full", "adapter"])
def test_what_is_published_is_the_student_alone(tmp_path: Path, given: Any) -> None:
    model = saved(tmp_path / "student", tiny_llama(V))
    trainer = cross_trainer(tmp_path / "run", HIDDEN, model=model, config={"max_steps": 2}, **given)
    trainer.model.float()
    trainer.train()
    final = trainer.save_final(tmp_path / "final")
    loaded, said = AutoModelForCausalLM.from_pretrained(final, output_loading_info=True)
    assert not any(said.values()), said
    ids = torch.tensor([tiny_tokenizer_().encode("two plus two")])
    trainer.model.eval()
    torch.testing.assert_close(loaded(ids).logits, trainer.model(ids).logits, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(loaded(ids).logits, tiny_llama(V)(ids).logits, atol=1e-4)
    assert AutoTokenizer.from_pretrained(final).get_vocab() == tiny_tokenizer().get_vocab()


def test_an_adapter_that_is_not_merged_is_published_alone(tmp_path: Path) -> None:
    model = saved(tmp_path / "student", tiny_llama(V))
    trainer = cross_trainer(tmp_path / "run", HIDDEN, model=model, peft_config=lora(), config={"merge_adapter": False})
    trainer.model.float()
    trainer.train()
    with safe_open(trainer.save_final(tmp_path / "final") / "adapter_model.safetensors", "pt") as file:
        names = list(file.keys())
    assert any("lora_A" in name for name in names) and not any(MODULES in name for name in names)


# Rollouts

ROLLED = {"on_policy_fraction": 1.0, "max_completion_length": 6, "max_length": 64}
GREEDY = {**ROLLED, "rollout": RolloutConfig(temperature=0.0)}
PROMPTS = [{"prompt": pair["prompt"] + " so" * i} for i, pair in enumerate(PAIRS[:8])]


class Spy(HFTeacher):
    """A teacher that asserts that tokens are its own."""

    def __init__(self) -> None:
        super().__init__(other_model(), tokenizer=teachers_tokenizer())
        self.rows = 0

    def signal(self, batch: Any, positions: Positions, layers: tuple[int, ...] = ()) -> TeacherSignal:
        assert (batch["input_ids"] < W).all() and (positions.labels < W).all()
        self.rows += len(batch["input_ids"])
        return super().signal(batch, positions, layers)


def text_of(tokenizer: Any, batch: dict[str, Any], row: int) -> bytes:
    ids = batch["input_ids"][row][batch["attention_mask"][row].bool()].tolist()
    return b"".join(spelled(tokenizer)[token] for token in ids if not is_special(tokenizer, token)).lstrip(b" ")


def rolled_out(student: nn.Module, rows: list[dict[str, str]]) -> list[tuple[Side, Side]]:
    """Greedy completions, tokenised for the teacher from their text."""
    found, (mine, theirs) = [], (tiny_tokenizer_(), teachers_tokenizer())
    for row in rows:
        prompts = [tokenizer.encode(row["prompt"]) for tokenizer in (mine, theirs)]
        answer = greedy(student, prompts[0])
        ended = answer[-1] == mine.eos_token_id
        text = b"".join(spelled(mine)[token] for token in answer[: len(answer) - ended]).decode()
        other = theirs.encode("\n" + text)
        while b"".join(spelled(theirs)[token] for token in other) != text.encode():
            other.pop(0)
        other += [theirs.eos_token_id] * ended
        found.append((answered(mine, prompts[0], answer), answered(theirs, prompts[1], other)))
    return found


@pytest.mark.parametrize("objective", [SHARP, HybridULD()], ids=["alm", "hybrid"])
def test_the_teacher_reads_what_the_student_has_said_in_its_own_tokens(tmp_path: Path, objective: Any) -> None:
    gradients, teacher = Gradients(), Spy()
    trainer = cross_trainer(
        tmp_path, objective, model=speaking(), teacher=teacher, rows=PROMPTS, config=GREEDY, callbacks=[gradients]
    )
    trainer.train()
    student = speaking()
    expected = plain(student, other_model(), rolled_out(student, PROMPTS), objective)
    assert logged(trainer) == [pytest.approx(expected.loss().item(), rel=1e-6)]
    assert_same(gradients.steps[0], plain_gradients(student, expected.loss()), tolerance=1e-7)
    assert teacher.rows == 8 and expected.counts["distill"] > 8


@pytest.mark.parametrize(
    "config",
    [
        {"on_policy_fraction": 0.5},
        {"max_staleness": 1, "rollout": RolloutConfig(temperature=0.0)},
        {"num_generations": 2},
    ],
    ids=str,
)
def test_ways_of_rolling_out(tmp_path: Path, config: dict[str, Any]) -> None:
    """Where the student's text is UTF-8, the teacher's rows have the same text; the sampled ones are mostly not."""
    options = {**ROLLED, "max_steps": 3, **config}
    trainer = cross_trainer(tmp_path, model=speaking(), teacher=Spy(), rows=PAIRS[:16], config=options)
    trainer.train()
    trainer.close()
    whole = 0
    for batch in trainer.batches:
        for row in range(len(batch["labels"])):
            ours, theirs = text_of(tiny_tokenizer_(), batch, row), text_of(teachers_tokenizer(), batch["other"], row)
            assert ours.startswith(theirs)
            whole += ours == theirs
    scored = [int((labels != -100).sum()) for batch in trainer.batches for labels in batch["labels"]]
    if config.get("on_policy_fraction") == 0.5:
        drawn = sum(n == 6 for n in scored)
        assert 4 <= drawn <= 20, "24 coins"
        assert max(scored) > 6, "and the others keep their own completion"
    else:
        assert max(scored) <= 6
    if config.get("num_generations") == 2:
        assert trainer.batches[0]["sample_id"][::2].equal(trainer.batches[0]["sample_id"][1::2])
    assert whole >= len(scored) // 4 and len(logged(trainer)) == 3


class Scripted:
    """A sampler that says what it is told, in the order of the prompts."""

    def __init__(self, *texts: tuple[bytes, bool]) -> None:
        self.texts = texts

    def generate(self, prompts: list[list[int]], params: SamplingParams, **given: Any) -> list[Completion]:
        return [self.completion(*text) for text in self.texts[: len(prompts)]]

    @staticmethod
    def completion(text: bytes, ended: bool) -> Completion:
        alphabet = {text: token for token, text in enumerate(spelled(tiny_tokenizer_())) if len(text) == 1}
        ids = [alphabet[bytes([byte])] for byte in text] + [tiny_tokenizer_().eos_token_id] * ended
        return Completion(ids=ids, logp=[0.0] * len(ids), finish="stop" if ended else "length")


def scripted(directory: Path, *texts: tuple[bytes, bool], objective: Any = SHARP, **config: Any) -> Any:
    size = {"per_device_train_batch_size": len(texts), "max_completion_length": 64, **config}
    trainer = cross_trainer(directory, objective, rows=PROMPTS[: len(texts)], teacher=Spy(), config={**ROLLED, **size})
    trainer.on_policy.rollouts = replace(trainer.on_policy.rollouts, sampler=Scripted(*texts))
    trainer.train()
    return trainer


def test_completions_are_tokenised_from_their_bytes(tmp_path: Path) -> None:
    """Byte by byte, as no tokenizer would say it; cut within a character; of bytes that are no text."""
    said = [(b" four clips in May", True), (" café".encode(), True), (" so é".encode()[:-1], False), (b"\xff four", False)]
    trainer = scripted(tmp_path, *said)
    (batch,) = trainer.batches
    read = []
    for row in range(4):
        other = batch["other"]
        ids = other["input_ids"][row][other["labels"][row] != -100].tolist()
        read.append(b"".join(spelled(teachers_tokenizer())[token] for token in ids))
    assert read == [b" four clips in May</s>", " café</s>".encode(), b" so ", b""]
    natural = teachers_tokenizer().encode("\n four clips in May")
    ids = batch["other"]["input_ids"][0][batch["other"]["labels"][0] != -100].tolist()
    assert natural[-len(ids) + 1 :] == ids[:-1], "as the teacher's tokenizer writes it"
    assert batch["chunk"].amax(1).tolist()[3] == -1 and (batch["chunk"].amax(1)[:3] > 0).all()
    assert batch["unread"].tolist() == [False, False, False, True]
    assert logged(trainer, "alignment/unread_ratio") == [0.25]


def test_rows_that_the_teacher_cannot_read_are_still_learnt_from(tmp_path: Path) -> None:
    """When no row has a chunk, and when those of one micro-batch have none."""
    unread, read = (b"\xff\xfe\xff", True), (b" four clips", True)
    none, student, values = scripted(tmp_path / "none", unread, unread), double(), []
    for row in PROMPTS[:2]:
        ids = Scripted.completion(*unread).ids
        one = answered(tiny_tokenizer_(), tiny_tokenizer_().encode(row["prompt"]), ids)
        one.run(student, size=V)
        values += [one.of(i) for i in range(one.first, len(one.ids))]
    assert logged(none) == [pytest.approx(-SHARP.cross_entropy * torch.stack(values).mean().item(), rel=1e-6)]
    assert logged(none, "alignment/chunked_ratio") == [0.0] and logged(none, "alignment/unread_ratio") == [1.0]

    cut, whole = (scripted(tmp_path / str(size), unread, read, objective=HIDDEN, **batch_of(size)) for size in (1, 2))
    for key in ("loss", "grad_norm", "alignment/chunked_ratio"):
        assert logged(cut, key) == pytest.approx(logged(whole, key), rel=1e-6), key
    assert 0.0 < logged(cut, "alignment/chunked_ratio")[0] < 1.0


def batch_of(size: int) -> dict[str, int]:
    return {"per_device_train_batch_size": size, "gradient_accumulation_steps": 2 // size}
