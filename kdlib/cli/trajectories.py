"""``kdlib trajectories``: what a model goes through when it decodes prompts, for ``kdlib jacobi`` and ``kdlib diffusion``."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from typing import Any

from rich.console import Console

from kdlib.cli.parsing import check_least

KINDS = {
    "jacobi": "a causal model's greedy outputs and the states that Jacobi decoding goes through",
    "diffusion": "a diffusion model's verified answers and the step in which it committed each of their tokens",
}
COUNTS = ("rows_per_shard", "batch_size", "max_prompt_length", "limit")

# What trajectories of every kind depend on, beside the model and the prompts: it may not change when a run is continued.
SAME = ("rows_per_shard", "dtype", "attn_implementation", "load_in_8bit", "load_in_4bit", "seed")


@dataclass
class TrajectoriesArguments:
    """Which model decodes which prompts, and where that is written.

    Args:
        model: the model that decodes, a path or Hub id.
        dataset_name: rows with a prompt (text or messages), messages, a question, or input_ids and labels; files, a glob or
            a Hub id.
        output_dir: the directory to write.
        dataset_config: configuration name of a Hub dataset.
        dataset_train_split: split of the rows.
        limit: use only the first rows.
        tokenizer: path or Hub id of the tokenizer; the model's own, or that of the checkpoint a server names.
        apply_chat_template: put prompts that are text into a user turn; null does so where there is a chat template.
        chat_template_kwargs: passed to the chat template, for example {enable_thinking: true}.
        max_prompt_length: prompts of more tokens are skipped; what the model's context leaves room for when left out.
        rows_per_shard: prompts in a file; what a killed run does again, at most.
        batch_size: rows decoded together.
        dtype: the weights, auto (as saved), float32 or bfloat16.
        attn_implementation: sdpa, eager or flex_attention.
        load_in_8bit: load the model in 8 bits (needs bitsandbytes).
        load_in_4bit: load the model in 4 bits (needs bitsandbytes).
        trust_remote_code: run the code that a model on the Hub brings. Off unless you have read it.
        device: cpu, cuda or cuda:N; chosen when left out.
        seed: of the draws.
        overwrite: delete the trajectories in output_dir and start anew.
    """

    model: str
    dataset_name: str
    output_dir: str
    dataset_config: str | None = None
    dataset_train_split: str = "train"
    limit: int | None = None
    tokenizer: str | None = None
    apply_chat_template: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    max_prompt_length: int | None = None
    rows_per_shard: int = 500
    batch_size: int = 8
    dtype: str = "auto"
    attn_implementation: str | None = None
    load_in_8bit: bool = False
    load_in_4bit: bool = False
    trust_remote_code: bool = False
    device: str | None = None
    seed: int = 0
    overwrite: bool = False

    def __post_init__(self) -> None:
        check_least(self, dict.fromkeys(COUNTS, 1))


def run(words: list[str]) -> int:
    kind, *rest = words or [""]
    if kind in KINDS:
        return int(import_module(f"kdlib.cli.trajectory.{kind}").run(rest))
    if not {"-h", "--help", "--help_all"} & set(words):
        raise ValueError(
            f"say which trajectories, {' or '.join(KINDS)}: kdlib trajectories {next(iter(KINDS))} --model MODEL "
            "--dataset_name ROWS --output_dir DIR"
        )
    console = Console(soft_wrap=True, highlight=False)
    console.print("usage: kdlib trajectories KIND --model MODEL --dataset_name ROWS --output_dir DIR [--OPTION VALUE ...]\n")
    for name, what in KINDS.items():
        console.print(f"  {name:<12}{what}", markup=False)
    console.print("\nkdlib trajectories KIND --help shows its options.", markup=False)
    return 0
