"""Run by torchrun: one loss and its gradients with the student sharded by FSDP2 over gloo, against the unsharded student."""

from __future__ import annotations

import copy

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from kdlib.data.positions import causal_positions
from kdlib.head import Head
from kdlib.models import hidden_states
from kdlib.objectives import ForwardKL, Objective, Sinkhorn
from kdlib.trainers.redirect import inside_forward
from kdlib.types import StudentSignal, TeacherSignal
from tests.tiny import tiny_llama

VOCAB = 64


# one whose gradients are made in the forward pass, and one that reads the head again in backward
OBJECTIVES = (ForwardKL(), Sinkhorn(group="sequence"))


def loss_sum(
    model: torch.nn.Module, batch: dict[str, torch.Tensor], teacher: torch.Tensor, objective: Objective
) -> torch.Tensor:
    positions = causal_positions(batch)
    hidden, _ = hidden_states(model, batch)
    student = StudentSignal(hidden=hidden.flatten(0, 1)[positions.index], head=Head.of(model), positions=positions)
    return objective(student, TeacherSignal(logits=teacher)).sum


def check(objective: Objective) -> None:
    rank, world = dist.get_rank(), dist.get_world_size()
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, VOCAB, (2 * world, 9), generator=generator)
    teacher = torch.randn(2 * world * 8, VOCAB, generator=generator)
    batch = {"input_ids": ids, "labels": ids.clone(), "sequence": torch.arange(2 * world)[:, None].expand(-1, 9)}
    plain = tiny_llama(VOCAB, hidden=32, layers=2, seed=0)
    sharded = copy.deepcopy(plain)
    for layer in sharded.model.layers:
        fully_shard(layer)
    fully_shard(sharded)

    loss_sum(plain, batch, teacher, objective).backward()
    mine = {key: value[2 * rank : 2 * rank + 2] for key, value in batch.items()} | {
        "sequence": torch.arange(2)[:, None].expand(-1, 9)
    }
    rows = teacher[16 * rank : 16 * rank + 16]
    total = inside_forward(sharded, sharded, lambda b: {"sum": loss_sum(sharded, b, rows, objective)}, mine)["sum"]
    (total * world).backward()  # FSDP averages over ranks

    for (name, expected), parameter in zip(plain.named_parameters(), sharded.parameters(), strict=True):
        assert isinstance(parameter.grad, DTensor), name
        torch.testing.assert_close(
            parameter.grad.full_tensor(), expected.grad, rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{objective} {n}: {m}"
        )
    try:
        Head.of(sharded)
    except ValueError as refusal:
        assert "sharded" in str(refusal)
    else:
        raise AssertionError("a sharded head was read outside the forward")


def main() -> None:
    dist.init_process_group("gloo")
    for objective in OBJECTIVES:
        check(objective)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
