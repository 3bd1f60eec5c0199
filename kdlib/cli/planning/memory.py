"""What a run holds in the memory of one device, in each phase of it."""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass
from typing import Any

import psutil
import torch
from peft import PeftModel
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from kdlib.cli.planning.live import tensor_bytes
from kdlib.cli.planning.models import AbsentServer, stand_in
from kdlib.cli.planning.optimizer import optimizer_name, state_bytes, update_bytes
from kdlib.cli.planning.step import GRADIENTS
from kdlib.head import Head
from kdlib.kernels.chunked import chunk_rows
from kdlib.teachers import ConsistencyEnsemble, HFTeacher, VLLMTeacher, leaves
from kdlib.trainers.setup import self_teachers

# Python with torch, transformers, datasets and peft: the peak of a whole kdlib distill with models of 40,000 parameters.
PROCESS = 770 * 2**20
# On a CPU glibc takes tensors of up to 32 MiB from one heap: pieces freed between those that stay are lost to larger ones, and
# what the heap has grown to it keeps to the end. In a LoRA run that was 0.8 of a step's bytes more. With this variable at
# 1048576 tensors are mapped one by one and given back, and nothing is lost: the same run then held what its tensors take.
MAPPED = "MALLOC_MMAP_THRESHOLD_"
LOST, KEPT = 0.7, "kept by glibc"
# A CUDA context with the libraries' own memory; from their documentation, not measured here.
CONTEXT = 2**30
# vLLM on CPU takes this for its cache unless VLLM_CPU_KVCACHE_SPACE (GiB) says otherwise.
VLLM_CPU_CACHE_GIB = 4
# Tensors [chunk, V] in float32 that a chunk's loss holds on a GPU: logits and log-probs of both, a temporary, the gradient.
GPU_CHUNK_TENSORS = 6
# A quantised weight of bitsandbytes: its bits, and scales in 8 bits for 64 of them with their own.
QUANTISED = {4: 0.5 + 1 / 64, 8: 1.0 + 4 / 4096}


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How a run is spread: over ``processes`` devices, cpu or cuda, the student ``sharded`` over them or whole on each."""

    device: str
    processes: int = 1
    sharded: bool = False

    @property
    def share(self) -> int:
        """Into how many parts the student, its gradients and its optimizer are cut."""
        return self.processes if self.sharded else 1


def phases(
    trainer: Any,
    layout: Layout,
    *,
    traced: dict[str, int],
    rollouts: dict[str, int],
    bits: int | None = None,
    keeps_engine: bool = False,
) -> dict[str, dict[str, int]]:
    """{phase: {part: bytes}} on one device; the run needs the largest sum.

    traced: what a step holds beside weights and optimizer; rollouts: what drawing them holds, empty without any.
    bits: of a quantised student's weights. keeps_engine: what draws rollouts stays while the student is trained.
    """
    model = trainer.accelerator.unwrap_model(trainer.model)
    trained = [x for x in model.parameters() if x.requires_grad]
    optim, share = optimizer_name(trainer.args), layout.share
    state, update = state_bytes(trained, optim), update_bytes(trained, optim, device=layout.device)
    always = {"process": PROCESS if layout.device == "cpu" else CONTEXT, "student": _weights(model, bits) // share}
    always |= {"teacher": _teacher_bytes(trainer), "optimizer": state // share}
    always |= _copies(trainer, model) | (rollouts if keeps_engine else {})
    training = {**traced, GRADIENTS: traced.get(GRADIENTS, 0) // share, **_spread(model, trained, layout)}
    if layout.device == "cuda" and trainer.accelerator.device.type == "cpu":
        training["loss chunk on the GPU"] = _gpu_chunk(trainer, model)
    made, lost = _heap(traced, layout)
    found = {
        "training": {**always, **training, KEPT: lost},
        "update": {**always, GRADIENTS: tensor_bytes(trained) // share, "update": update // share},
        "writing final/": {**always, "copy of the student": _result_bytes(trainer, model, layout), KEPT: made + lost},
    }
    if rollouts and not keeps_engine:
        found["rollouts"] = {**always, **rollouts}
    return {phase: {part: size for part, size in parts.items() if size} for phase, parts in found.items()}


def _heap(traced: dict[str, int], layout: Layout) -> tuple[int, int]:
    """Bytes that a step leaves in glibc's heap, and those that are lost in it while the step runs."""
    if layout.device != "cpu" or platform.libc_ver()[0] != "glibc" or MAPPED in os.environ:
        return 0, 0
    made = sum(size for part, size in traced.items() if part != GRADIENTS)
    return made, int(LOST * made)


def _weights(model: nn.Module, bits: int | None) -> int:
    """Parameters and buffers; with ``bits``, frozen linear layers but the head as quantised."""
    whole = tensor_bytes([*model.parameters(), *model.buffers()])
    if bits is None:
        return whole
    head = model.get_output_embeddings()  # type: ignore[operator]
    kept = [x for layer in model.modules() if isinstance(layer, nn.Linear) and layer is not head for x in [layer.weight]]
    frozen = [x for x in kept if not x.requires_grad]
    return whole - tensor_bytes(frozen) + int(sum(x.numel() * QUANTISED[bits] for x in frozen))


def _teacher_bytes(trainer: Any) -> int:
    """Weights of teachers in this process, each once; those that a teacher made of the student shares count with it."""
    tensors: list[Tensor] = []
    for leaf in leaves(trainer.teacher):
        for one in leaf.teachers if isinstance(leaf, ConsistencyEnsemble) else (leaf,):
            if isinstance(one, HFTeacher):
                tensors += [*one.model.parameters(), *one.model.buffers()]
            if isinstance(one, AbsentServer):
                tensors += one.weights
            if isinstance(one, VLLMTeacher) and one.kind == "hidden":
                tensors += stand_in(trainer).weights
    shared = {id(x) for x in trainer.model.parameters()}
    own = [x for one in self_teachers(trainer.teacher) if one.model is not None for x in one.model.parameters()]
    return tensor_bytes([*tensors, *(x for x in own if id(x) not in shared)])


def _copies(trainer: Any, model: nn.Module) -> dict[str, int]:
    """Weights that rollouts are drawn with while the student goes on."""
    args = trainer.args
    keeps = trainer.on_policy is not None and (args.max_staleness > 0 or args.rollout_refresh_steps > 1)
    return {"copy for rollouts": tensor_bytes(model.parameters())} if keeps else {}


def engine_bytes(trainer: Any, layout: Layout, *, total: int) -> int:
    """A vLLM engine beside the trainer: its part of a GPU's ``total``, or on CPU the weights and its cache."""
    if layout.device == "cuda":
        return int(trainer.args.rollout.gpu_memory_utilization * total)
    space = int(os.environ.get("VLLM_CPU_KVCACHE_SPACE", VLLM_CPU_CACHE_GIB)) * 2**30
    return space + tensor_bytes(trainer.accelerator.unwrap_model(trainer.model).parameters())


def _spread(model: nn.Module, trained: list[Tensor], layout: Layout) -> dict[str, int]:
    """What several processes add: DDP's buckets of gradients, or what FSDP has gathered, a layer in use and the next one."""
    if layout.processes == 1:
        return {}
    if not layout.sharded:
        return {"buckets of DDP": tensor_bytes(trained)}
    layers = [tensor_bytes(one.parameters()) for one in model.modules() if isinstance(one, nn.ModuleList)]
    blocks = [tensor_bytes(one.parameters()) for each in model.modules() if isinstance(each, nn.ModuleList) for one in each]
    outside = tensor_bytes(model.parameters()) - max(layers, default=0)
    return {"gathered by FSDP": outside + 2 * max(blocks, default=0)}


def _gpu_chunk(trainer: Any, model: nn.Module) -> int:
    """The loss of a chunk on a GPU, where chunks are larger than on this machine, which has none."""
    head = Head.of(model, vocab_size=trainer.vocab_size)
    with FakeTensorMode():
        rows = chunk_rows(torch.empty(1, device="cuda"), head)
    return GPU_CHUNK_TENSORS * 4 * rows * head.out_features


def _result_bytes(trainer: Any, model: nn.Module, layout: Layout) -> int:
    """The student is loaded as published to be looked at; an adapter is merged into a copy, in the host's memory."""
    inside = model.get_base_model() if isinstance(model, PeftModel) else model
    count = sum(x.numel() for x in inside.parameters())
    merged = tensor_bytes(inside.parameters()) if isinstance(model, PeftModel) and layout.device == "cpu" else 0
    return max(count * trainer.published_dtype.itemsize, merged)


def free_memory(device: str) -> int:
    """Bytes that a run in this process may hold: those that are free, and those that the process has already."""
    if device == "cuda":
        return int(torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved())
    return int(psutil.virtual_memory().available + psutil.Process().memory_info().rss)


def whole_memory() -> int:
    """Bytes of the GPU, free or not."""
    return int(torch.cuda.mem_get_info()[1])
