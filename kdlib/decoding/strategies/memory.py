"""What strategies keep of a window's columns from one pass to the next, while the window moves."""

from __future__ import annotations

from torch import Tensor

from kdlib.decoding.diffusion_step import Step


def remember(step: Step, name: str, states: Tensor) -> None:
    """Keeps ``states`` [b, n, ...] of the window's columns as ``name``."""
    step.memory[name] = states
    step.memory[f"{name} columns"] = step.column.masked_fill(step.block < 0, -1)


def remembered(step: Step, name: str) -> tuple[Tensor, Tensor] | None:
    """What ``remember`` kept of the columns of this step's window [b, n, ...], and of which it did [b, n]; None without any."""
    if name not in step.memory:
        return None
    states, columns = step.memory[name], step.memory[f"{name} columns"]
    index = (step.column - columns[:, :1]).clamp(0, columns.shape[1] - 1)
    expanded = index.view(*index.shape, *[1] * (states.ndim - 2)).expand(-1, -1, *states.shape[2:])
    return states.gather(1, expanded), columns.gather(1, index) == step.column
