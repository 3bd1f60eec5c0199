"""What a speed was measured on."""

from __future__ import annotations

import torch
from torch import nn


def machine_of(model: nn.Module) -> str:
    """The accelerator a model lies on, or the CPU with the threads that torch uses."""
    device = next(model.parameters()).device
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type}, torch threads: {torch.get_num_threads()}"
