"""Choosing the command, and turning a user's mistake into one line and exit code 2."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from importlib import import_module

from rich.console import Console

import kdlib

COMMANDS = {
    "demo": "no GPU, no network: train a teacher, distil a student, score both, write an HTML report",
    "run": "a whole recipe: generate, distill, evaluate and others, one after the other, with one report",
    "distill": "train a student on a teacher's distributions",
    "draft": "train a draft for speculative decoding, and measure what its target accepts",
    "cache": "write a teacher's top-k or sampled signals to disk, to train without loading it",
    "trajectories": "what decoding in parallel goes through: trajectories jacobi, trajectories diffusion",
    "jacobi": "train a model to decode several tokens per forward pass, by Jacobi decoding",
    "diffusion": "train a masked diffusion language model, or one to decode in fewer steps",
    "generate": "let a teacher answer prompts: verified traces that train as they are",
    "evaluate": "score models: problems, lm-eval tasks, bits per byte, KL; evaluate acceptance | jacobi | diffusion: decoding",
    "audit": "look for a planted behaviour that a student took over from its teacher",
    "export": "export draft: a directory that vLLM loads; export diffusion: a model with its decoding settings",
    "transplant": "give a model another tokenizer, or one of bytes, to be distilled from its old self next",
    "plan": "memory, disk, steps and time of a run before it starts; plan draft: which shapes of drafts can pay",
    "push": "send a finished run, a cache or traces to the Hugging Face Hub, with a card",
    "recipes": "list or copy ready YAML recipes and accelerate configurations",
    "env": "versions and devices, for a bug report",
}
BAR_DELAY = "2"  # seconds until a progress bar shows: what is quick, such as loading a small model, needs none

# A mistake, a disk or network in the way, a package that is missing.
NOT_A_DEFECT = (ValueError, OSError, ImportError)


def main(argv: list[str] | None = None) -> int:
    """Runs a command and returns its exit code.

    0: it worked. 2: what was asked for cannot be done, one line on stderr says why. 130 and 143: Ctrl-C or
    SIGTERM stopped it in good order. 1: a defect, with its traceback (Python's own), or a check of kdlib evaluate acceptance
    or kdlib evaluate jacobi that failed, or a planted behaviour that kdlib audit has found.
    """
    words = sys.argv[1:] if argv is None else argv
    console = Console(stderr=True, soft_wrap=True, highlight=False)
    if not words or words[0] in ("-h", "--help", "help"):
        _usage(Console(soft_wrap=True, highlight=False))
        return 0 if words else 2
    if words[0] == "--version":
        Console(highlight=False).print(f"kdlib {kdlib.__version__}")
        return 0
    if words[0] not in COMMANDS:
        console.print(f"kdlib: no command {words[0]!r}: choose {', '.join(COMMANDS)}", style="red", markup=False)
        return 2
    _quieten_libraries()
    try:
        return int(import_module(f"kdlib.cli.{words[0]}").run(words[1:]))
    except NOT_A_DEFECT as error:
        if os.environ.get("KDLIB_DEBUG"):
            raise
        console.print(f"kdlib {words[0]}: {_one_line(error)}", style="red", markup=False)
        return 2
    except KeyboardInterrupt:
        console.print(f"kdlib {words[0]}: stopped", style="red")
        return 130


def _quieten_libraries() -> None:
    """Settings that libraries read when they are imported, which is why commands import them late; and two
    messages that are understood and ask for nothing.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TQDM_DELAY", BAR_DELAY)
    os.environ.setdefault("DATASETS_VERBOSITY", "critical")  # it logs what our own message says better
    warnings.filterwarnings("ignore", message="'pin_memory' argument is set as true but no accelerator")
    # newest checkpoints are found by their number, which is what transformers falls back to
    logging.getLogger("transformers.trainer_utils").addFilter(lambda record: "mtime" not in record.getMessage())


def _one_line(error: Exception) -> str:
    message = str(error)
    if isinstance(error, OSError) and error.strerror and error.filename:
        message = f"{error.strerror}: {error.filename}"
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    return " ".join(lines) or type(error).__name__


def _usage(console: Console) -> None:
    console.print("kdlib: knowledge distillation for language models\n\nusage: kdlib COMMAND [options]\n", markup=False)
    for name, what in COMMANDS.items():
        console.print(f"  {name:<14}{what}", markup=False)
    console.print("\nkdlib COMMAND --help shows its options; KDLIB_DEBUG=1 shows whole tracebacks.", markup=False)
