"""``kdlib env``: what a bug report needs, and nothing that identifies the machine or its user."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from rich.console import Console
from rich.table import Table

import kdlib

PACKAGES = (
    "torch",
    "transformers",
    "trl",
    "datasets",
    "peft",
    "accelerate",
    "lm_eval",
    "vllm",
    "triton",
    "bitsandbytes",
    "flash_attn",
    "deepspeed",
)


def environment() -> dict[str, Any]:
    """Versions of the packages that matter, Python, platform, devices and threads."""
    import torch

    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "devices": devices or ["cpu"],
        "packages": {
            "kdlib": kdlib.__version__,
            **{name: found for name in PACKAGES if (found := _version(name))},
        },
    }


def machine_line() -> str:
    """The environment in one sentence, for tables of results."""
    found = environment()
    versions = ", ".join(f"{name} {version}" for name, version in found["packages"].items())
    machine = f"{found['cores']} cores, {', '.join(found['devices'])}, {found['threads']} threads"
    return f"Machine: {machine}. {versions}, Python {found['python']}."


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def run(words: list[str]) -> int:
    if words and words[0] not in ("-h", "--help"):
        raise ValueError(f"kdlib env takes no options, not {words[0]}")
    found = environment()
    table = Table(title="kdlib env", show_header=False)
    for key, value in {**{k: v for k, v in found.items() if k != "packages"}, **found["packages"]}.items():
        table.add_row(key, ", ".join(value) if isinstance(value, list) else str(value))
    Console().print(table)
    return 0
