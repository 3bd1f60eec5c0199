"""A tiny student and teacher, rows of unequal length, and the plain loss that trainers are compared with."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from peft import LoraConfig
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedTokenizerBase, TrainerCallback

from kdlib.trainers import DistillationConfig, DistillationTrainer
from tests.tiny import tiny_llama, tiny_tokenizer

TEXTS = [f"{'two plus ' * (1 + 5 * i % 7)}{i} is four, because the sky is blue." for i in range(24)]
ROWS = [{"text": text} for text in TEXTS]
V = len(tiny_tokenizer())

PlainLoss = Callable[[Tensor, Tensor, Tensor], Tensor]  # (teacher log-probs, student log-probs, labels) of rows -> [n]


def saved(directory: Path, model: nn.Module, tokenizer: PreTrainedTokenizerBase | None = None) -> str:
    """A model with its tokenizer on disk, as users have them."""
    model.save_pretrained(directory)  # type: ignore[operator]
    (tokenizer or tiny_tokenizer()).save_pretrained(directory)
    return str(directory)


C = TypeVar("C", bound=DistillationConfig)


def settings_of(config: type[C], directory: Path, **options: Any) -> C:
    """Four rows a step on CPU, every step logged, nothing saved unless ``options`` say otherwise."""
    return config(
        **{
            "output_dir": str(directory),
            "use_cpu": True,
            "per_device_train_batch_size": 4,
            "max_steps": 1,
            "logging_steps": 1,
            "learning_rate": 1e-3,
            "save_strategy": "no",
            "disable_tqdm": True,
            **options,
        }
    )


def settings(directory: Path, **options: Any) -> DistillationConfig:
    return settings_of(DistillationConfig, directory, **options)


def trainer_of(directory: Path, *, rows: Any = ROWS, config: dict[str, Any] | None = None, **given: Any) -> DistillationTrainer:
    """A trainer of a tiny student and teacher; ``given`` replaces its arguments, ``config`` its options."""
    arguments = {
        "model": tiny_llama(V),
        "teacher": tiny_llama(V, seed=1),
        "train_dataset": rows,
        "processing_class": tiny_tokenizer(),
        **given,
    }
    return DistillationTrainer(**arguments, args=settings(directory, **(config or {})))


def logged(trainer: DistillationTrainer, key: str = "loss") -> list[float]:
    """The values of one key over the log lines that have it."""
    return [line[key] for line in trainer.state.log_history if key in line]


class Gradients(TrainerCallback):
    """The gradients of every optimizer step, as the optimizer gets them: {parameter: gradient}."""

    def __init__(self) -> None:
        self.steps: list[dict[str, Tensor]] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        named = given["model"].named_parameters()
        self.steps.append({name: p.grad.clone() for name, p in named if p.grad is not None})


def plain_loss(student: nn.Module, teacher: nn.Module | None, rows: Any, loss: PlainLoss) -> Tensor:
    """The mean over all scored tokens, from whole logits of one unpadded row after another."""
    total, count = torch.zeros((), dtype=torch.float64), 0
    for row in rows:
        ids, labels = torch.tensor([row["input_ids"]]), torch.tensor(row["labels"])[1:]
        scored = labels != -100
        q = student(input_ids=ids).logits[0, :-1, :V][scored].log_softmax(-1)
        with torch.no_grad():
            p = q if teacher is None else teacher(input_ids=ids).logits[0, :-1, :V][scored].log_softmax(-1)
        total, count = total + loss(p, q, labels[scored]).sum(), count + int(scored.sum())
    return total / count


def forward_kl(p: Tensor, q: Tensor, labels: Tensor) -> Tensor:
    return (p.exp() * (p - q)).sum(-1)


def reverse_kl(p: Tensor, q: Tensor, labels: Tensor) -> Tensor:
    return (q.exp() * (q - p)).sum(-1)


def cross_entropy(p: Tensor, q: Tensor, labels: Tensor) -> Tensor:
    return -q[torch.arange(len(labels)), labels]


def half_and_half(p: Tensor, q: Tensor, labels: Tensor) -> Tensor:
    return 0.5 * forward_kl(p, q, labels) + 0.5 * cross_entropy(p, q, labels)


def plain_gradients(student: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    """d loss / d parameter for those that are trained."""
    named = {name: p for name, p in student.named_parameters() if p.requires_grad}
    return dict(zip(named, torch.autograd.grad(loss, list(named.values())), strict=True))


def double(seed: int = 0, **config: Any) -> Any:
    return tiny_llama(V, seed=seed, **config).double()


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor], *, tolerance: float = 1e-6) -> None:
    """Llama's norms are float32 whatever the weights are, which gradients of one large pass and of many small ones show."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(
            found[name], value, rtol=tolerance, atol=tolerance, msg=lambda text, name=name: f"{name}: {text}"
        )


class Weights(TrainerCallback):
    """The student as it is before every step."""

    def __init__(self) -> None:
        self.steps: list[dict[str, Tensor]] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        self.steps.append({name: x.clone() for name, x in given["model"].state_dict().items()})


def lora(**options: Any) -> LoraConfig:
    """B drawn at random, so that the adapter changes what the model says from the first step on."""
    given = {"target_modules": ["q_proj", "v_proj", "lm_head"], "r": 4, "lora_alpha": 8, "init_lora_weights": False, **options}
    return LoraConfig(task_type="CAUSAL_LM", **given)


def weights_of(trainer: DistillationTrainer) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters()}


class Logits(TorchDispatchMode):
    """The most rows of a tensor [rows, size] that any operation makes; the vocabulary's size is no other one's here."""

    def __init__(self, size: int = V) -> None:
        super().__init__()
        self.size, self.rows = size, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, Tensor) and tensor.ndim > 1 and tensor.shape[-1] == self.size:
                self.rows = max(self.rows, tensor.numel() // self.size)
        return out
