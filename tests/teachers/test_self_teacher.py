"""The student as its own teacher: which weights answer, that nothing of the student changes, and that averages resume."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

from kdlib.kernels import linear_objective
from kdlib.models import hidden_states
from kdlib.objectives import ForwardKL
from kdlib.teachers import SelfTeacher
from kdlib.types import Head, StudentSignal, Support
from tests.teachers.fakes import ROWS, collated
from tests.tiny import tiny_llama

V = 32


def plain(**config: Any) -> nn.Module:
    return tiny_llama(V, **config).double()


def adapted(**options: Any) -> PeftModel:
    """LoRA on attention and head, with pairs that change what the model says."""
    config = LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "v_proj", "lm_head"], **options)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = get_peft_model(tiny_llama(V), config)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter, std=0.5)
    return model  # type: ignore[return-value]


def said(model: nn.Module, batch: dict[str, Tensor], index: Tensor) -> Tensor:
    """log-probs by the model's own forward."""
    with torch.no_grad():
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    return logits.flatten(0, 1)[index].log_softmax(-1)


def answer(teacher: SelfTeacher, batch: dict[str, Any], where: Any) -> Tensor:
    return teacher.signal(batch, where).at(slice(None), 1.0).logp


def moved(model: nn.Module, *, by: float = 0.1) -> None:
    """As an optimizer step: every trained weight changes."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(by * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(5)).to(parameter))


def bound(kind: Any, model: nn.Module, **options: Any) -> SelfTeacher:
    teacher = SelfTeacher(kind, **options)
    teacher.bind_student(model)
    return teacher


def test_the_student_is_followed_as_it_is() -> None:
    model = plain()
    teacher, (batch, where) = bound("student", model), collated(ROWS)
    assert teacher.inside_forward and teacher.provides is Support.FULL
    before = answer(teacher, batch, where)
    torch.testing.assert_close(before, said(model, batch, where.index))
    moved(model)
    teacher.after_step()
    after = answer(teacher, batch, where)
    torch.testing.assert_close(after, said(model, batch, where.index))
    assert (after - before).abs().max() > 1e-2


@pytest.mark.parametrize("kind", ["student", "ema", "copy", "adapter_off"])
def test_dropout_is_off_for_the_teacher_and_the_students_modes_stay(kind: Any) -> None:
    model = adapted(lora_dropout=0.0)
    for layer in model.modules():
        if type(layer).__name__ == "LlamaAttention":
            layer.attention_dropout = 0.5
    model.train()
    model.base_model.model.model.norm.eval()
    modes = {name: module.training for name, module in model.named_modules()}
    trained = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    teacher, (batch, where) = bound(kind, model), collated(ROWS)
    first, second = (answer(teacher, batch, where) for _ in range(2))
    assert torch.equal(first, second)
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == trained


def test_no_gradient_flows_through_the_teacher() -> None:
    model = plain()
    teacher, (batch, where) = bound("student", model), collated(ROWS)
    prompted, of_teacher = collated([{**row, "teacher_prompt_ids": [21, 22]} for row in ROWS])
    hidden, _ = hidden_states(model, batch)
    rows = hidden.flatten(0, 1)[where.index]
    student = StudentSignal(hidden=rows, head=Head.of(model), positions=where)
    loss = linear_objective(student, teacher.signal(prompted, of_teacher), ForwardKL())
    loss.sum.backward()
    found = {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}
    model.zero_grad()
    p = said(
        model,
        {k.removeprefix("teacher_"): prompted[k] for k in ("teacher_input_ids", "teacher_attention_mask")},
        of_teacher.teacher_index,
    )  # type: ignore[arg-type]
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits.flatten(0, 1)[where.index]
    (p.exp() * (p - logits.log_softmax(-1))).sum().backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, rtol=1e-6, atol=1e-9, msg=name)


def test_adapter_off_is_the_model_below_the_adapter() -> None:
    model = adapted()
    teacher, (batch, where) = bound("adapter_off", model), collated(ROWS)
    found = answer(teacher, batch, where)
    torch.testing.assert_close(found, said(tiny_llama(V), batch, where.index), rtol=1e-4, atol=1e-5)
    assert (found - said(model, batch, where.index)).abs().max() > 1e-2
    moved(model)
    torch.testing.assert_close(answer(teacher, batch, where), found)
    with pytest.raises(ValueError, match="needs a student with an adapter: give peft_config"):
        bound("adapter_off", plain())


def test_the_average_follows_its_recurrence() -> None:
    model = tiny_llama(V)
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16()
    teacher, (batch, where) = bound("ema", model, decay=0.9), collated(ROWS)
    wanted = {name: parameter.detach().float().clone() for name, parameter in model.named_parameters()}
    for _ in range(3):
        moved(model)
        teacher.after_step()
        now = {name: parameter.detach().float() for name, parameter in model.named_parameters()}
        wanted = {name: 0.9 * average + 0.1 * now[name] for name, average in wanted.items()}
    assert not teacher.inside_forward
    averaged = tiny_llama(V)
    averaged.load_state_dict({**averaged.state_dict(), **wanted})
    found = answer(teacher, batch, where)
    torch.testing.assert_close(found, said(averaged, batch, where.index), rtol=1e-4, atol=1e-4)
    assert (found - said(model, batch, where.index).float()).abs().max() > 1e-2
    assert all(parameter.dtype == torch.bfloat16 and parameter.requires_grad for parameter in model.parameters())


def test_of_an_adapted_student_only_what_is_trained_is_averaged_and_the_rest_is_shared() -> None:
    model = adapted()
    teacher, (batch, where) = bound("ema", model, decay=0.5), collated(ROWS)
    start = {name: x.detach().clone() for name, x in model.named_parameters() if x.requires_grad}
    moved(model)
    teacher.after_step()
    frozen = {id(x) for x in model.parameters() if not x.requires_grad}
    assert teacher.model is not None and frozen <= {id(x) for x in teacher.model.parameters()}
    found = answer(teacher, batch, where)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.copy_(0.5 * start[name] + 0.5 * parameter)
    torch.testing.assert_close(found, said(model, batch, where.index), rtol=1e-4, atol=1e-5)


both = pytest.mark.parametrize("make", [lambda: tiny_llama(V, tie_word_embeddings=True), adapted], ids=["tied", "adapted"])


@both
def test_a_copy_stays_until_it_is_refreshed(make: Any) -> None:
    model = make()
    teacher, (batch, where) = bound("copy", model), collated(ROWS)
    assert not teacher.inside_forward and teacher.keeps_weights
    start = answer(teacher, batch, where)
    torch.testing.assert_close(start, said(model, batch, where.index), rtol=1e-4, atol=1e-5)
    moved(model)
    teacher.after_step()
    assert torch.equal(answer(teacher, batch, where), start)
    teacher.refresh()
    refreshed = answer(teacher, batch, where)
    torch.testing.assert_close(refreshed, said(model, batch, where.index), rtol=1e-4, atol=1e-5)
    assert (refreshed - start).abs().max() > 1e-2
    moved(model)
    assert torch.equal(answer(teacher, batch, where), refreshed), "it is no view of the student"
    frozen = {id(x) for x in model.parameters() if not x.requires_grad}
    assert teacher.model is not None and frozen <= {id(x) for x in teacher.model.parameters()}


@pytest.mark.parametrize("kind", ["student", "adapter_off"])
def test_kinds_without_weights_have_nothing_to_refresh(kind: Any) -> None:
    model = adapted()
    teacher, (batch, where) = bound(kind, model), collated(ROWS)
    before = answer(teacher, batch, where)
    teacher.refresh()
    assert torch.equal(answer(teacher, batch, where), before)


@both
def test_a_refreshed_copy_is_saved_and_resumed(make: Any, tmp_path: Path) -> None:
    model = make()
    teacher, (batch, where) = bound("copy", model), collated(ROWS)
    moved(model)
    teacher.refresh()
    moved(model)
    teacher.save(tmp_path)
    again = bound("copy", model)
    assert (answer(again, batch, where) - answer(teacher, batch, where)).abs().max() > 1e-3  # or the test shows nothing
    again.load(tmp_path)
    assert torch.equal(answer(again, batch, where), answer(teacher, batch, where))


@both
def test_averages_are_saved_and_resumed(make: Any, tmp_path: Path) -> None:
    model = make()
    teacher, (batch, where) = bound("ema", model, decay=0.7), collated(ROWS)
    moved(model)
    teacher.after_step()
    teacher.save(tmp_path)
    again = bound("ema", model, decay=0.7)
    assert (answer(again, batch, where) - answer(teacher, batch, where)).abs().max() > 1e-3  # or the test shows nothing
    again.load(tmp_path)
    for one in (teacher, again):
        moved(model, by=0.0)
        one.after_step()
    assert torch.equal(answer(again, batch, where), answer(teacher, batch, where))


def test_only_weights_of_its_own_need_a_file(tmp_path: Path) -> None:
    model = plain()
    following = bound("student", model)
    following.save(tmp_path)
    following.load(tmp_path)
    assert list(tmp_path.iterdir()) == []
    for kind in ("ema", "copy"):
        message = rf"holds no teacher_ema.safetensors: it was not written with SelfTeacher\(kind='{kind}'\)"
        with pytest.raises(ValueError, match=message):
            bound(kind, model).load(tmp_path)
    bound("ema", plain(layers=1)).save(tmp_path)
    for kind in ("ema", "copy"):
        with pytest.raises(ValueError, match="keeps other weights than this student trains"):
            bound(kind, model).load(tmp_path)


@pytest.mark.parametrize("kind", ["student", "ema", "copy", "adapter_off"])
def test_a_privileged_prompt_is_read_in_the_prompts_place(kind: Any) -> None:
    model = adapted()
    teacher = bound(kind, model)
    batch, where = collated([{**row, "teacher_prompt_ids": [21, 22, 23]} for row in ROWS])
    bare, positions = collated(
        [
            {"input_ids": [21, 22, 23, *row["input_ids"][i:]], "labels": [-100] * 3 + row["labels"][i:], "sample_id": 0}
            for row, i in zip(ROWS, (2, 1, 1, 4), strict=True)
        ]
    )
    torch.testing.assert_close(answer(teacher, batch, where), answer(teacher, bare, positions))
    assert (
        where.teacher_index is not None
        and (answer(teacher, *collated(ROWS)) - answer(teacher, batch, where)).abs().max() > 1e-2
    )


def test_the_head_is_cut_to_the_tokenizer() -> None:
    teacher, (batch, where) = bound("student", plain(), vocab_size=24), collated(ROWS)
    assert teacher.signal(batch, where).vocab_size == 24


def test_options_without_meaning_are_refused() -> None:
    with pytest.raises(ValueError, match="student, ema, copy or adapter_off, not 'teacher'"):
        SelfTeacher("teacher")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"decay must be at least 0 and below 1, not 1.0"):
        SelfTeacher("ema", decay=1.0)
