"""Jacobi trajectories of a real model: all blocks of several rows in the same passes, against one block after another.

    OMP_NUM_THREADS=1 python benchmarks/trajectories.py [--quick] [--output docs/results/trajectories.md]

The 4.2M-parameter GSM8K model, float32, one thread, test questions of GSM8K. Packed, as kdlib trajectories jacobi does it:
greedy outputs first, 32 rows at a time, then all blocks of 8 rows at a time; its time has both. Block by block:
jacobi_generate with its cache, batch 1 and 8. CLLM's way: one row, one block, every pass over the whole text, no cache.
Methods take turns on the same 32 questions; all must come to the same states.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from page import markdown_table, write_results
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, AutoTokenizer

from kdlib.decoding import generate
from kdlib.decoding.jacobi import jacobi_generate
from kdlib.decoding.jacobi_states import packed_states
from kdlib.types import SamplingParams

ROOT = Path(__file__).resolve().parents[1]
MODEL, QUESTIONS = ROOT / "../shared/models/gsm8k-lm", ROOT / "../shared/data/gsm8k/test.jsonl"
SIZES = {"full": {"prompts": 64, "new": 128}, "quick": {"prompts": 2, "new": 24}}
EOS, WRITTEN, ITERATED = 2, 32, 8  # the stop token; rows at a time
OUTPUTS = "the greedy outputs alone, batch 32"
HEAD = ["method", "tokens", "passes", "seconds", "tokens/s", "packed is"]

States = list[list[list[int]]]  # of a row: of each block, its states
Method = Callable[[list[list[int]]], tuple[list[States], int]]  # trajectories, and passes made


def questions(n: int) -> list[list[int]]:
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    lines = QUESTIONS.read_text().splitlines()[:n]
    return [tokenizer(f"<|bos|><|user|>{json.loads(line)['question']}<|assistant|>")["input_ids"] for line in lines]


def written(model: Any, prompts: list[list[int]], *, new: int) -> list[list[int]]:
    """The greedy outputs, stop token included."""
    params = SamplingParams(max_tokens=new, temperature=0.0, stop_ids=(EOS,))
    return [one.ids for one in generate(model, prompts, params, seeds=[0] * len(prompts), pad_token_id=0)]


def packed(model: Any, prompts: list[list[int]], *, new: int, n: int) -> tuple[list[States], int]:
    outputs = written(model, prompts, new=new)
    rows: dict[int, States] = {}
    forwards = max(map(len, outputs))
    order = sorted(range(len(prompts)), key=lambda row: len(outputs[row]))
    for start in range(0, len(order), ITERATED):
        some = order[start : start + ITERATED]
        ids = [torch.tensor(prompts[row] + outputs[row]) for row in some]
        found = packed_states(
            model,
            pad_sequence(ids, batch_first=True),
            attention_mask=pad_sequence([torch.ones_like(row) for row in ids], batch_first=True),
            prompt_lengths=torch.tensor([len(prompts[row]) for row in some]),
            block_size=n,
        )
        assert bool((found.converged | (found.lengths == 0)).all())
        forwards += found.forwards + 1
        for place, (ks, vs) in enumerate(zip(found.iterations.tolist(), found.lengths.tolist(), strict=True)):
            pairs = enumerate(zip(ks, vs, strict=True))
            rows[some[place]] = [found.states[:k, place, block, :v].tolist() for block, (k, v) in pairs if v]
    return [rows[row] for row in range(len(prompts))], forwards


def block_by_block(model: Any, prompts: list[list[int]], *, new: int, n: int, batch: int) -> tuple[list[States], int]:
    rows: list[States] = []
    forwards = 0
    for start in range(0, len(prompts), batch):
        some = [torch.tensor(x) for x in prompts[start : start + batch]]
        mask = pad_sequence([torch.ones_like(x) for x in some], batch_first=True, padding_side="left")
        ids = pad_sequence(some, batch_first=True, padding_side="left")
        options = {"max_new_tokens": new, "block_size": n, "stop_ids": (EOS,), "return_trajectories": True}
        output = jacobi_generate(model, ids, attention_mask=mask, **options)
        assert output.trajectories is not None
        rows += [[block.tolist() for block in row] for row in output.trajectories]
        forwards += output.forwards + 1
    return rows, forwards


def cllm(model: Any, prompts: list[list[int]], *, new: int, n: int) -> tuple[list[States], int]:
    """Each block iterated by passes over all of the text so far and the block, as Consistency_LLM collects its data."""
    rows, forwards = [], 0
    for prompt in prompts:
        text, blocks = list(prompt), []
        known = int(model(input_ids=torch.tensor([text])).logits[0, -1].argmax())
        forwards += 1
        while len(text) - len(prompt) < new and text[-1] != EOS:
            first = len(text) - len(prompt)
            states = [[known, *(prompt[p % len(prompt)] for p in range(first + 1, first + n))]]
            while len(states) < 2 or states[-1] != states[-2]:
                choice: Tensor = model(input_ids=torch.tensor([text + states[-1]])).logits[0, -n:].argmax(-1)
                states.append([known, *choice[:-1].tolist()])
                forwards += 1
            v = states[-1].index(EOS) + 1 if EOS in states[-1] else min(n, new - first)
            blocks.append(_distinct([state[:v] for state in states]))
            text, known = text + states[-1][:v], int(choice[-1])
        rows.append(blocks)
    return rows, forwards


def _distinct(states: Sequence[list[int]]) -> list[list[int]]:
    return [state for k, state in enumerate(states) if k == 0 or state != states[k - 1]]


def compare(model: Any, prompts: list[list[int]], *, new: int, n: int) -> list[list[str]]:
    methods: dict[str, Method] = {
        OUTPUTS: lambda some: ([], max(map(len, written(model, some, new=new)))),
        "packed": lambda some: packed(model, some, new=new, n=n),
        "block by block, batch 8": lambda some: block_by_block(model, some, new=new, n=n, batch=8),
        "block by block, batch 1": lambda some: block_by_block(model, some, new=new, n=n, batch=1),
        "CLLM's way": lambda some: cllm(model, some, new=new, n=n),
    }
    for method in methods.values():
        method(prompts[:1])  # the first run allocates
    seconds, passes, tokens = dict.fromkeys(methods, 0.0), dict.fromkeys(methods, 0), 0
    for start in range(0, len(prompts), WRITTEN):
        found: dict[str, list[States]] = {}
        for name, method in methods.items():
            began = time.perf_counter()
            found[name], made = method(prompts[start : start + WRITTEN])
            seconds[name] += time.perf_counter() - began
            passes[name] += made
        assert all(rows == found["packed"] for name, rows in found.items() if name != OUTPUTS), "methods came to other states"
        tokens += sum(len(block[-1]) for row in found["packed"] for block in row)
    return [
        [name, f"{tokens:,}", f"{passes[name]:,}", f"{s:.1f}", f"{tokens / s:,.0f}", f"{s / seconds['packed']:.1f}x as fast"]
        for name, s in seconds.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--block_size", type=int, nargs="+", default=[16], help="tokens of a block")
    parser.add_argument("--quick", action="store_true", help="a few tokens, to see that the script works")
    parser.add_argument("--output", help="write the tables as Markdown to this file")
    arguments = parser.parse_args()
    sizes = SIZES["quick" if arguments.quick else "full"]
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    model, prompts = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval(), questions(sizes["prompts"])
    parts = [
        f"{sizes['prompts']} GSM8K test questions, up to {sizes['new']} new tokens each, init prompt; the 4.2M-parameter GSM8K "
        "model, float32, one thread. Tokens: of the greedy outputs, whose blocks' states were all collected; packed has the "
        "passes and the time of writing the outputs (first line) too. All methods came to the same states."
    ]
    for n in arguments.block_size:
        rows = compare(model, prompts, new=sizes["new"], n=n)
        shown = Table(*HEAD, title=f"block_size {n}")
        for row in rows:
            shown.add_row(*row)
        Console().print(shown)
        parts += [f"## block_size {n}", markdown_table(HEAD, rows)]
    if arguments.output:
        write_results(arguments.output, title="Jacobi trajectories: packed against block by block", parts=parts)


if __name__ == "__main__":
    main()
