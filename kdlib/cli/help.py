"""--help: our own options in groups with their defaults; --help_all: the rest of TrainingArguments too."""

from __future__ import annotations

import dataclasses
import importlib
import re
from collections.abc import Sequence
from typing import Any

import yaml
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from kdlib.cli.grammar import CLASS_KEYS, objective_names
from kdlib.cli.parsing import option_names

# Options inherited from TrainingArguments that a first run meets, in our words.
COMMON = {
    "output_dir": "where the run is written; the same command resumes there",
    "num_train_epochs": "how often every row is seen",
    "max_steps": "optimizer steps; above 0 it overrides num_train_epochs",
    "per_device_train_batch_size": "rows of a micro-batch on each device",
    "gradient_accumulation_steps": "micro-batches per optimizer step",
    "warmup_steps": "steps until the peak learning rate; below 1 it is a share of all steps",
    "weight_decay": "of AdamW",
    "max_grad_norm": "larger gradients are scaled down to this norm",
    "gradient_checkpointing": "recompute activations in the backward pass: less memory, more time",
    "eval_strategy": "when to compute the evaluation loss: no, steps or epoch",
    "eval_steps": "every how many steps, with eval_strategy steps",
    "save_steps": "every how many steps, with save_strategy steps",
    "seed": "of new weights, data order and draws",
    "use_cpu": "stay on the CPU",
}
REQUIRED = ("output_dir",)  # inherited with a default, but a run needs a place of its own


def show_help(command: str, description: str, classes: Sequence[type], *, everything: bool) -> None:
    """Prints usage, description and a table of options for each dataclass."""
    console = Console(highlight=False)
    needed = [
        f"--{name} {name.upper()}" for cls in classes for name in option_names(cls) if shown_default(cls, name) == "required"
    ]
    usage = " ".join(["usage: kdlib", command, *needed, "[--OPTION VALUE ...]"])
    paragraphs = [" ".join(part.split()) for part in description.split("\n\n")]
    console.print("\n\n".join([usage, *paragraphs]), markup=False)
    hidden = 0
    for cls in classes:
        rows = _rows(cls, everything=everything)
        hidden += len(option_names(cls)) - len(rows)
        _section(console, _title(cls), rows)
        for name, part in nested(cls).items():
            _section(console, _title(part), [(f"--{name}.{key}", default, text) for key, default, text in _own(part)])
        if any(name in CLASS_KEYS for name in option_names(cls)):
            _section(
                console,
                "Objectives and their options: --objective Name --objective.OPTION VALUE",
                _objectives(diffusion=command == "diffusion"),
            )
    _section(console, "Every command", _general(hidden))


def _rows(cls: type, *, everything: bool) -> list[tuple[str, str, str]]:
    """(option, default, text) of what the class documents; of inherited options the common ones, or all."""
    ours = [base for base in reversed(cls.__mro__) if base.__module__.startswith("kdlib.")]
    own = {name: text for base in ours for name, text in docs(base).items()}
    theirs = next((base for base in cls.__mro__ if base not in ours and dataclasses.is_dataclass(base)), None)
    inherited = {} if theirs is None else COMMON
    texts = {**(docs(theirs) if theirs is not None and everything else {}), **inherited, **own}
    chosen = [*inherited, *own, *(option_names(cls) if everything else ())]
    names = [name for name in dict.fromkeys(chosen) if name in option_names(cls)]
    return [(f"--{name}", shown_default(cls, name), texts.get(name, "")) for name in names]


def nested(cls: type) -> dict[str, type]:
    """{option: dataclass} of the options that are groups of options, such as ``rollout``."""
    made: dict[str, Any] = {field.name: field.default_factory for field in dataclasses.fields(cls)}
    names = [name for name in option_names(cls) if name not in CLASS_KEYS]
    return {name: made[name] for name in names if isinstance(made[name], type) and dataclasses.is_dataclass(made[name])}


def _own(cls: type) -> list[tuple[str, str, str]]:
    return [(name, shown_default(cls, name), text) for name, text in docs(cls).items()]


def docs(cls: Any) -> dict[str, str]:
    """{option: what it does} from a class's ``Args:``; of transformers' longer texts the first sentence."""
    parts = re.split(r"\n {8}(\w+) ?(\(.*\))?:\s", cls.__doc__ or "")
    found = {}
    for name, theirs, text in zip(parts[1::3], parts[2::3], parts[3::3], strict=True):
        words = " ".join(text.split()).rstrip(".")
        found[name] = re.split(r"\. (?=[A-Z])| > ", words)[0] if theirs else words
    return found


def _title(cls: type) -> str:
    return (cls.__doc__ or cls.__name__).splitlines()[0].rstrip(".")


def shown_default(cls: Any, name: str) -> str:
    field = next(field for field in dataclasses.fields(cls) if field.name == name)
    if (name in REQUIRED and field.default is None) or field.default is field.default_factory is dataclasses.MISSING:
        return "required"
    value = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
    if dataclasses.is_dataclass(value):
        return type(value).__name__
    return _shown(getattr(value, "value", value))


def _shown(value: Any) -> str:
    """A value as YAML writes it; nothing for null, which means that the option is not set."""
    if value is None or isinstance(value, str):
        return value or ""
    return yaml.safe_dump(value, default_flow_style=True).removesuffix("\n").removesuffix("\n...")


def _objectives(*, diffusion: bool) -> list[tuple[str, str, str]]:
    home = importlib.import_module("kdlib.objectives")
    rows = []
    for name in objective_names(diffusion=diffusion):
        cls = getattr(home, name)
        shared = ("temperature", "t_squared") if issubclass(cls, home.RowObjective) else ()
        own = [field for field in dataclasses.fields(cls) if field.name not in shared]
        options = ", ".join(f"{field.name}={shown_default(cls, field.name)}" for field in own)
        rows.append((name, options, _title(cls)))
    base = "DiffusionObjective" if diffusion else "RowObjective"
    rows.append(("file.py:Name", "", f"one of your own: a frozen dataclass derived from {base}"))
    if diffusion:
        return rows
    return [
        *rows,
        (
            "row by row",
            "temperature=1.0, t_squared=false",
            "of all but Sinkhorn and REDI: divides both models' logits; multiplies the loss by temperature squared",
        ),
    ]


def _general(hidden: int) -> list[tuple[str, str, str]]:
    rows = [
        ("--config FILE", "", "options from a YAML file, KEY: VALUE; what is typed overrides it"),
        ("--print_config", "", "print every option with its value, as such a file, and exit"),
    ]
    return [*rows, ("--help_all", "", f"{hidden} more options, of transformers.TrainingArguments")] if hidden else rows


def _section(console: Console, title: str, rows: Sequence[tuple[str, str, str]]) -> None:
    console.print(f"\n{title}", style="bold", markup=False)
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column(max_width=24, overflow="fold")
    table.add_column()
    for name, default, text in rows:
        table.add_row(f"  {name}", escape(default), escape(text.replace("``", "")))
    console.print(table)
