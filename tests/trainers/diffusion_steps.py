"""A trainer of a tiny float64 diffusion model, one of its steps, and what its rows are in it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from kdlib.diffusion import DiffusionSpec, as_diffusion
from kdlib.trainers import DiffusionConfig, DiffusionTrainer
from kdlib.trainers.diffusion_views import draws_of, rows_of
from tests.tiny import tiny_llama, tiny_tokenizer
from tests.trainers.diffusion_plain import EOS, FAVOURED, MASK, SIZE, Masked, Text, texts
from tests.trainers.small import Gradients, assert_same, logged, plain_gradients, settings_of

ROWS = texts()
MASK_TOKEN = "<|mask|>"
BLOCKS: dict[str, Any] = {"attention": "block_causal", "block_length": 4}
PLAIN = {"block_length": 4, "max_length": 64, "max_grad_norm": 1e9, "seed": 2}  # a seed that masks some of every row


def masked_tokenizer() -> PreTrainedTokenizerBase:
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"mask_token": MASK_TOKEN})
    assert (tokenizer.mask_token_id, tokenizer.eos_token_id) == (MASK, EOS)
    return tokenizer


def exact(model: Any) -> Any:
    """In float64 throughout: Llama's own norms compute in float32 whatever the weights are."""
    for parent in list(model.modules()):
        for name, module in parent.named_children():
            if isinstance(module, LlamaRMSNorm):
                setattr(parent, name, nn.RMSNorm(len(module.weight), eps=module.variance_epsilon))
    return model.double()


def dllm(seed: int = 0, **spec: Any) -> Any:
    """A float64 diffusion model of random weights that says FAVOURED of many masked tokens; without learnt padding unless
    ``spec`` says otherwise.
    """
    made = exact(tiny_llama(SIZE, seed=seed, initializer_range=0.25))
    given = {"mask_token_id": MASK, "eos_token_id": EOS, "eos_padding": "none", **spec}
    as_diffusion(made, DiffusionSpec(**given))
    with torch.no_grad():  # hidden states have a part in common, by which the one token is said
        made.get_input_embeddings().weight += 0.3
        hidden = made.get_decoder()(input_ids=torch.arange(SIZE).reshape(-1, 19)).last_hidden_state
        made.lm_head.weight[FAVOURED] = 0.3 * hidden.mean((0, 1))
    return made


def diffusion_trainer(
    directory: Path,
    rows: Sequence[Text] | Dataset,
    *,
    config: dict[str, Any] | None = None,
    kind: type[DiffusionTrainer] = DiffusionTrainer,
    **given: Any,
) -> DiffusionTrainer:
    """A trainer of a tiny float64 model; one step over all rows unless ``config`` says otherwise."""
    dataset = rows if isinstance(rows, Dataset) else Dataset.from_list([row.row() for row in rows])
    options = {"per_device_train_batch_size": len(dataset), **PLAIN, **(config or {})}
    arguments = {"processing_class": masked_tokenizer(), **given}
    arguments.setdefault("model", dllm())
    return kind(**arguments, args=settings_of(DiffusionConfig, directory, **options), train_dataset=dataset)


def one_step(directory: Path, rows: Any, **given: Any) -> tuple[DiffusionTrainer, dict[str, Tensor]]:
    gradients = Gradients()
    trainer = diffusion_trainer(directory, rows, callbacks=[gradients], **given)
    trainer.train()
    return trainer, gradients.steps[0]


def masked_of(trainer: DiffusionTrainer, row: Text, *, step: int = 1, progress: float = 0.0) -> Masked:
    """A row in a step, collated and masked alone."""
    batch = trainer.data_collator([row.row()])
    draws = draws_of(batch, seed=trainer.args.seed, step=step)
    noise = trainer.masking.noise(rows_of(batch, trainer.spec), draws, progress=progress)
    return Masked(batch["input_ids"][0].tolist(), (batch["rank"][0] >= 0).tolist(), noise)


def uniform_of(trainer: DiffusionTrainer, row: Text, *, step: int = 1, stream: int = 1) -> list[float]:
    """The draws by which the teacher writes each token of a row for its view ``stream``; 0 for those of the prompt."""
    batch = trainer.data_collator([row.row()])
    drawn = iter(draws_of(batch, seed=trainer.args.seed, step=step, stream=stream).token[0].tolist())
    return [next(drawn) if own else 0.0 for own in (batch["rank"][0] >= 0).tolist()]


def assert_step(
    trainer: DiffusionTrainer,
    found: dict[str, Tensor],
    expected: Tensor,
    *,
    student: nn.Module,
    tolerance: float = 1e-6,
) -> None:
    """The last step's loss and gradients are those of the plain computation."""
    assert expected.item() > 1e-4, "it must have something to teach"
    assert logged(trainer)[-1] == pytest.approx(expected.item(), rel=tolerance)
    assert_same(found, plain_gradients(student, expected), tolerance=tolerance)


def masked_rows(trainer: DiffusionTrainer, rows: Sequence[Text] | None = None, **when: Any) -> list[Masked]:
    return [masked_of(trainer, row, **when) for row in (ROWS if rows is None else rows)]
