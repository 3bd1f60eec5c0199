"""Bytes that a piece of torch code holds at once, found by running it on tensors without memory."""

from __future__ import annotations

import copy
import weakref
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

_ITEM = torch.ops.aten._local_scalar_dense.default
_CHOOSING: dict[Any, Any] = {
    torch.ops.aten.nonzero.default: lambda x: torch.empty(x.numel(), x.ndim, dtype=torch.long, device=x.device),
    torch.ops.aten._unique2.default: lambda x: (x.flatten().clone(), *torch.empty(2, x.numel(), dtype=torch.long)),
}

_INDEXING = (torch.ops.aten.index.Tensor, torch.ops.aten.index_put.default, torch.ops.aten.index_put_.default)


def _all_of(indices: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Indices where masks without values choose everything."""
    found: list[Tensor | None] = []
    for index in indices:
        if isinstance(index, FakeTensor) and index.dtype is torch.bool:
            found += [torch.empty(index.numel(), dtype=torch.long, device=index.device)] * index.ndim
        else:
            found.append(index)
    return found


class LiveBytes(TorchDispatchMode):
    """Counts the storages that operations make and that something still refers to, by the ``label`` they were made under.

    ``at_most``: bytes by label at the moment when most were held. A storage counts from the operation that returns it until
    nothing refers to it, autograd's saved tensors included; what a kernel allocates and frees inside is not seen.

    Tensors without memory have no values: a number that the code looks at is 1 (a sum is finite, which is the usual way), and
    what is chosen by value is all that can be chosen.
    """

    def __init__(self) -> None:
        super().__init__()
        self.label = "other"
        self.now: Counter[str] = Counter()
        self.at_most: dict[str, int] = {}
        self._labels: Any = WeakIdKeyDictionary()

    def known(self, tensors: Iterable[Tensor]) -> None:
        """Tensors that are there already and do not count, nor do views of them."""
        for tensor in tensors:
            self._labels.setdefault(tensor.untyped_storage(), [""])

    def relabel(self, tensor: Tensor, label: str) -> None:
        """A tensor that has become something else, as what backward made becomes a gradient."""
        held = self._labels[tensor.untyped_storage()]
        size = tensor.untyped_storage().nbytes()
        self.now[held[0]] -= size
        self.now[label] += size
        held[0] = label

    @contextmanager
    def labelled(self, label: str) -> Iterator[None]:
        before, self.label = self.label, label
        yield
        self.label = before

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is _ITEM and isinstance(args[0], FakeTensor):
            return True if args[0].dtype is torch.bool else 1
        chosen = _CHOOSING.get(func) if args and isinstance(args[0], FakeTensor) else None
        if func in _INDEXING:
            args = (args[0], _all_of(args[1]), *args[2:])
        made = func(*args, **(kwargs or {})) if chosen is None else chosen(args[0])
        for tensor in tree_leaves(made):
            if isinstance(tensor, Tensor):
                self._note(tensor.untyped_storage())
        return made

    def _note(self, storage: torch.UntypedStorage) -> None:
        if storage in self._labels:
            return
        held, size = [self.label], storage.nbytes()  # a list, so that it can be relabelled after the callback has it
        self._labels[storage] = held
        weakref.finalize(storage, self._freed, held, size).atexit = False
        self.now[self.label] += size
        if self.now.total() > sum(self.at_most.values()):
            self.at_most = dict(self.now)

    def _freed(self, held: list[str], size: int) -> None:
        self.now[held[0]] -= size


def twin(model: nn.Module, mode: FakeTensorMode, *, device: torch.device) -> nn.Module:
    """The same modules with tensors as if on ``device`` that have no memory, tied ones tied; ``model`` may lie on meta."""
    with mode:
        here: dict[int, Any] = {
            id(x): nn.Parameter(torch.empty(x.shape, dtype=x.dtype, device=device), x.requires_grad) for x in model.parameters()
        }
        here |= {id(x): torch.empty(x.shape, dtype=x.dtype, device=device) for x in model.buffers()}
    return copy.deepcopy(model, here)


def without_memory(value: Any, mode: FakeTensorMode) -> Any:
    """``value`` with every tensor in it replaced by one of its shape: containers and dataclasses are gone through."""
    if isinstance(value, Tensor):
        return mode.from_tensor(value)
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{f.name: without_memory(getattr(value, f.name), mode) for f in fields(value) if f.init})
    if isinstance(value, Mapping):
        return {key: without_memory(x, mode) for key, x in value.items()}
    return [without_memory(x, mode) for x in value] if isinstance(value, list) else value


def tensor_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the tensors, each once."""
    return sum(x.numel() * x.element_size() for x in {id(x): x for x in tensors}.values())
