"""Bytes held at once, of known tensors and of real steps of trainers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import TrainerCallback

from kdlib.cli.planning.live import LiveBytes, tensor_bytes, twin, without_memory
from kdlib.cli.planning.memory import Layout, phases
from kdlib.cli.planning.rows import longest_rows
from kdlib.cli.planning.step import GRADIENTS, traced_step
from kdlib.objectives import CrossEntropy, GeneralizedJSD
from kdlib.trainers import DistillationConfig, DistillationTrainer
from kdlib.types import Positions
from tests.tiny import tiny_llama, tiny_tokenizer

KIB = 1024


def test_what_is_referred_to_counts_and_views_do_not() -> None:
    with FakeTensorMode(), LiveBytes() as live:
        first = torch.empty(256)
        with live.labelled("second"):
            second = first + 1
        seen = [first.view(16, 16), second[:8]]
        assert dict(live.now) == {"other": KIB, "second": KIB}
        del first, seen
        assert live.now.total() == KIB
        del second
        assert live.now.total() == 0
    assert live.at_most == {"other": KIB, "second": KIB}


def test_autograd_keeps_what_backward_needs() -> None:
    """y = relu(x w)^2 keeps x w's output twice at most: relu's result, and what is squared, which is the same tensor."""
    mode = FakeTensorMode()
    with mode:
        w = nn.Parameter(torch.empty(64, 64))
        x = torch.empty(256, 64)
    live = LiveBytes()
    live.known([w, x])
    with mode, live:
        y = (x @ w).relu().square().sum()
        assert live.now.total() == 256 * 64 * 4 + 4
        y.backward()
        live.relabel(w.grad, GRADIENTS)  # type: ignore[arg-type]
        assert live.now[GRADIENTS] == 64 * 64 * 4


def test_twins_keep_shapes_and_ties_and_take_no_memory() -> None:
    model = tiny_llama(64, tie_word_embeddings=True)
    made = twin(model, FakeTensorMode(), device=torch.device("cpu"))
    assert made.lm_head.weight is made.model.embed_tokens.weight
    assert {n: x.shape for n, x in made.named_parameters()} == {n: x.shape for n, x in model.named_parameters()}
    assert tensor_bytes(made.parameters()) == tensor_bytes(model.parameters())
    assert all(type(x).__name__ == "FakeTensor" for x in made.buffers())


def test_tensors_in_dataclasses_are_replaced() -> None:
    index = torch.arange(3)
    batch = {"positions": {"a": Positions(index=index, labels=index, sequence=index)}, "n": 1}
    made = without_memory(batch, FakeTensorMode())
    assert made["n"] == 1 and type(made["positions"]["a"].index).__name__ == "FakeTensor"


class Watched(TrainerCallback):
    """Counts what the second optimizer step holds, when the optimizer has its state."""

    def __init__(self) -> None:
        self.live, self.models = LiveBytes(), list[nn.Module]()

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == 1:
            for model in self.models:
                self.live.known([*model.parameters(), *model.buffers()])
            self.live.__enter__()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == 1:
            self.live.__exit__(None, None, None)


ROWS = [{"input_ids": [1, *range(3, 3 + length)], "labels": [1, *range(3, 3 + length)]} for length in (150, 200, 120, 199)]


def trainer(tmp_path: Path, watched: Watched, **options: Any) -> DistillationTrainer:
    """A trainer of rows as long as they are many; the loss has more rows than a chunk of the kernel."""
    tokenizer = tiny_tokenizer()
    args = {"per_device_train_batch_size": 4, "max_steps": 2, "save_strategy": "no", "use_cpu": True, "disable_tqdm": True}
    config = DistillationConfig(output_dir=str(tmp_path / "run"), logging_strategy="no", **{**args, **options.pop("args", {})})
    return DistillationTrainer(
        tiny_llama(len(tokenizer), hidden=64, layers=4),
        args=config,
        train_dataset=ROWS * (config.gradient_accumulation_steps),
        processing_class=tokenizer,
        callbacks=[watched],
        **options,
    )


CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "another loss": {"objective": GeneralizedJSD()},
    "no teacher": {"objective": CrossEntropy()},
    "accumulation": {"args": {"gradient_accumulation_steps": 2}},
    "checkpointing": {"args": {"gradient_checkpointing": True}},
    "adapter": {"peft_config": LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", r=4)},
    "bfloat16": {"args": {"bf16": True}},
}


@pytest.mark.parametrize("case", CASES)
def test_a_step_without_memory_holds_what_a_real_one_does(case: str, tmp_path: Path) -> None:
    """The same bytes counted in the trainer's own training loop, on real tensors."""
    options, watched = dict(CASES[case]), Watched()
    if "objective" not in options or case == "another loss":
        options["teacher"] = tiny_llama(len(tiny_tokenizer()), hidden=96, layers=2, seed=1)
    made = trainer(tmp_path, watched, **options)
    args = made.args
    rows = longest_rows(made, args.train_batch_size)
    accumulates = args.gradient_accumulation_steps > 1
    before = {name: x.clone() for name, x in made.model.state_dict().items()}
    traced = traced_step(made, rows, checkpointing=args.gradient_checkpointing, accumulates=accumulates)
    assert all(torch.equal(x, before[name]) for name, x in made.model.state_dict().items())
    watched.models = [made.model, *([made.teacher.model] if made.teacher is not None else [])]  # type: ignore[attr-defined]
    made.train()
    real = sum(watched.live.at_most.values())
    assert sum(traced.values()) == pytest.approx(real, rel=0.05), (traced, watched.live.at_most)


def test_phases_name_what_they_hold(tmp_path: Path) -> None:
    teacher = tiny_llama(len(tiny_tokenizer()), seed=1)
    made = trainer(tmp_path, Watched(), teacher=teacher)
    found = phases(made, Layout(device="cpu"), traced={GRADIENTS: 8}, rollouts={})
    weights = tensor_bytes([*made.model.parameters(), *made.model.buffers()])
    trained = tensor_bytes(made.model.parameters())
    assert found["training"]["student"] == weights and found["training"]["optimizer"] == 2 * trained
    assert found["training"]["teacher"] == tensor_bytes([*teacher.parameters(), *teacher.buffers()])
    assert found["update"][GRADIENTS] == trained and found["training"][GRADIENTS] == 8
