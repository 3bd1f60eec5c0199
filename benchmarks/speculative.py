"""Speculative decoding on a real model: are the tokens the target's own, and does the clock agree with the wall-time model?

    OMP_NUM_THREADS=1 python benchmarks/speculative.py [--draft NAME=DIR ...] [--quick] [--output docs/results/speculative.md]

Greedy tokens against the target's own, with a random draft, one that proposes what the target finds least likely, a pruned
target, and every --draft; the z-test of sampled tokens beside plain sampling (which it should pass) and lenience 2 (which it
should not); tokens per second of both loops and of transformers' assisted generation at the same gamma, methods taking turns
prompt by prompt. The 4-layer target is so small that a pass costs mostly Python, so there is a second target: 32 layers, of
which those added have output projections of zero. It is the same function of the text at eight times the cost.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from page import markdown_table, write_results
from rich.console import Console
from rich.table import Table
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM
from transformers.utils import logging

from kdlib.decoding import generate
from kdlib.decoding.speculative import SpeculativeOutput, speculative_generate
from kdlib.drafts import pruned
from kdlib.eval.costs import measure_costs
from kdlib.eval.losslessness import check_greedy, check_sampling
from kdlib.eval.speedup import speedup
from kdlib.types import SamplingParams

ROOT = Path(__file__).resolve().parents[1]
TARGET, QUESTIONS = ROOT / "../shared/models/gsm8k-lm", ROOT / "../shared/data/gsm8k/test.jsonl"
SIZES = {
    "full": {
        "prompts": 112,
        "new": 128,
        "timed": 4,
        "timed_new": 64,
        "layers": 32,
        "gammas": (2, 4),
        "batch": 28,
        "repeats": 20,
    },
    "quick": {"prompts": 4, "new": 8, "timed": 1, "timed_new": 8, "layers": 6, "gammas": (2,), "batch": 4, "repeats": 2},
}
GAMMA = 3  # of the losslessness checks
Rows = list[list[str]]


def questions(n: int) -> list[list[int]]:
    tokenizer = AutoTokenizer.from_pretrained(TARGET)
    lines = QUESTIONS.read_text().splitlines()[:n]
    return [tokenizer(f"<|bos|><|user|>{json.loads(line)['question']}<|assistant|>")["input_ids"] for line in lines]


def random_draft(target: Any) -> nn.Module:
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 2}
    ends = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=target.config.vocab_size, **sizes, **ends)).eval()


def opposite(target: Any) -> nn.Module:
    found = copy.deepcopy(target)
    found.lm_head.weight = nn.Parameter(-found.lm_head.weight.detach())
    return found


def deeper(target: Any, layers: int) -> nn.Module:
    """The same function with decoder layers added whose output projections are zero: they cost, and change nothing."""
    config = copy.deepcopy(target.config)
    config.num_hidden_layers = layers
    torch.manual_seed(0)
    found = LlamaForCausalLM(config).eval()
    found.load_state_dict(target.state_dict(), strict=False)
    for layer in found.model.layers[target.config.num_hidden_layers :]:
        layer.self_attn.o_proj.weight.data.zero_()
        layer.mlp.down_proj.weight.data.zero_()
    return found


def batches(prompts: Sequence[list[int]], size: int) -> Iterator[tuple[int, dict[str, torch.Tensor]]]:
    for start in range(0, len(prompts), size):
        rows = prompts[start : start + size]
        longest = max(map(len, rows))
        ids = [[0] * (longest - len(row)) + row for row in rows]
        mask = [[0] * (longest - len(row)) + [1] * len(row) for row in rows]
        yield start, {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}


def speculate(
    target: Any, draft: Any, prompts: Sequence[list[int]], *, size: int, **given: Any
) -> tuple[list[list[int]], Counter]:
    """New tokens of every prompt, and the counters of all."""
    outputs, total = [], Counter[str]()
    for start, batch in batches(prompts, size):
        seeds = range(start, start + len(batch["input_ids"]))
        output = speculative_generate(target, draft, **batch, gamma=GAMMA, seeds=seeds, **given)
        new = output.sequences[:, batch["input_ids"].shape[1] :].tolist()
        outputs += [row[:n] for row, n in zip(new, output.lengths.tolist(), strict=True)]
        total += Counter(rounds=int(output.rounds.sum()), drafted=int(output.drafted.sum()))
        total += Counter(accepted=int(output.accepted_per_position.sum()))
    return outputs, total


def rates(total: Counter) -> list[str]:
    return [f"{total['accepted'] / total['drafted']:.3f}", f"{1 + total['accepted'] / total['rounds']:.3f}"]


def greedy_table(target: Any, drafts: dict[str, Any], prompts: list[list[int]], sizes: dict[str, Any]) -> Rows:
    """Every prompt gets all of its tokens, whatever they say after the answer."""
    params = SamplingParams(max_tokens=sizes["new"], temperature=0.0)
    alone = generate(target, prompts, params, seeds=range(len(prompts)), pad_token_id=0, batch_size=sizes["batch"])
    expected, rows = [one.ids for one in alone], []
    for name, draft in drafts.items():
        found, total = speculate(target, draft, prompts, size=sizes["batch"], max_new_tokens=sizes["new"], stop_ids=())
        check = check_greedy(target, prompts, outputs=found, expected=expected)
        gap = max((one.gap for one in check.differences), default=0.0)
        identical = f"{check.identical} of {check.prompts}"
        rows.append([name, str(sizes["batch"]), identical, f"{gap:.1e}" if gap else "", *rates(total)])
    return rows


def sampling_table(target: Any, drafts: dict[str, Any], prompts: list[list[int]], sizes: dict[str, Any]) -> Rows:
    rows = []
    for top_p in (1.0, 0.9):
        params = SamplingParams(max_tokens=sizes["new"], temperature=1.0, top_p=top_p, stop_ids=(2,))
        given = {"size": sizes["batch"], "max_new_tokens": sizes["new"], "temperature": 1.0, "top_p": top_p}
        plain = generate(target, prompts, params, seeds=range(len(prompts)), pad_token_id=0, batch_size=sizes["batch"])
        runs: dict[str, tuple[list[list[int]], list[str]]] = {"none": ([one.ids for one in plain], ["", ""])}
        for name, draft in drafts.items():
            for way, extra in WAYS.items():
                if "lenience" in extra and top_p < 1:
                    continue  # once is enough to see that the test can fail
                found, total = speculate(target, draft, prompts, **given, **extra)
                runs[f"{name}{way}"] = (found, rates(total))
        for name, (found, rate) in runs.items():
            check = check_sampling(target, prompts, outputs=found, params=params)
            rows.append([name, f"{top_p:g}", f"{check.tokens:,}", f"{check.excess:+.4f}", f"{check.z:+.2f}", *rate])
    return rows


WAYS: dict[str, dict[str, Any]] = {
    "": {},
    ", drafted greedily": {"draft_sampling": "greedy"},
    ", lenience 2": {"lenience": 2.0},
}


def assisted(target: Any, draft: Any, ids: list[int], *, new: int, gamma: int) -> list[int]:
    """transformers' assisted generation with a fixed gamma."""
    draft.generation_config.num_assistant_tokens = gamma
    draft.generation_config.num_assistant_tokens_schedule = "constant"
    draft.generation_config.assistant_confidence_threshold = 0.0
    given = {"input_ids": torch.tensor([ids]), "attention_mask": torch.ones(1, len(ids), dtype=torch.long)}
    out = target.generate(**given, assistant_model=draft, do_sample=False, max_new_tokens=new, pad_token_id=0)
    return out[0, len(ids) :].tolist()


def timed(target: Any, draft: Any, prompts: list[list[int]], *, new: int, gamma: int) -> tuple[dict[str, float], float]:
    """({method: seconds over all prompts}, acceptance_length); every method must write the same tokens."""
    total = Counter[str]()

    def ours(ids: list[int]) -> list[int]:
        output = speculative_generate(target, draft, torch.tensor([ids]), max_new_tokens=new, gamma=gamma, stop_ids=())
        total.update(_counted(output))
        return output.sequences[0, len(ids) :].tolist()

    params = SamplingParams(max_tokens=new, temperature=0.0)
    methods: dict[str, Callable[[list[int]], list[int]]] = {
        "alone": lambda ids: generate(target, [ids], params, seeds=[0], pad_token_id=0)[0].ids,
        "ours": ours,
        "transformers": lambda ids: assisted(target, draft, ids, new=new, gamma=gamma),
    }
    for method in methods.values():
        method(prompts[0])  # the first run allocates
    total.clear()
    seconds = dict.fromkeys(methods, 0.0)
    for ids in prompts:
        written = []
        for name, method in methods.items():
            start = time.perf_counter()
            written.append(method(ids))
            seconds[name] += time.perf_counter() - start
        assert all(one == written[0] for one in written), "methods wrote different tokens"
    return seconds, 1 + total["accepted"] / total["rounds"]


def _counted(output: SpeculativeOutput) -> dict[str, int]:
    return {"rounds": int(output.rounds.sum()), "accepted": int(output.accepted_per_position.sum())}


def clock_table(pairs: dict[tuple[str, str], tuple[Any, Any]], prompts: list[list[int]], sizes: dict[str, Any]) -> Rows:
    rows, new = [], sizes["timed_new"]
    context = sum(map(len, prompts)) // len(prompts) + new // 2
    for (name, draft_name), (target, draft) in pairs.items():
        for model in (target, draft):
            model.generation_config.eos_token_id = None  # all methods write all tokens
        costs = measure_costs(target, draft, gammas=sizes["gammas"], context=context, repeats=sizes["repeats"])
        for gamma in sizes["gammas"]:
            seconds, length = timed(target, draft, prompts, new=new, gamma=gamma)
            rate = {method: len(prompts) * new / value for method, value in seconds.items()}
            model = speedup(length, gamma=gamma, c=costs.c, v=costs.v[gamma])
            ratios = [rate["ours"] / rate["alone"], rate["transformers"] / rate["alone"]]
            numbers = [length, costs.c, costs.v[gamma], model, *ratios]
            rows.append([name, draft_name, str(gamma), *(f"{x:.2f}" for x in numbers), *(f"{x:.0f}" for x in rate.values())])
    return rows


TABLES = {
    "Greedy tokens": ["draft", "batch", "identical", "largest gap", "acceptance_rate", "acceptance_length"],
    "Sampled tokens": ["draft", "top_p", "tokens", "excess (nats)", "z", "acceptance_rate", "acceptance_length"],
    "The clock": [
        *("target", "draft", "gamma", "acceptance_length", "c", "v", "speed-up, model", "speed-up, measured"),
        *("transformers' speed-up", "tokens/s, target alone", "tokens/s, ours", "tokens/s, transformers"),
    ],
}


NOTES = {
    "Greedy tokens": "No stop token. Identical: token for token what the target alone writes; the gap is that "
    "of the two logits where a row first differs (a tie within rounding, if small).",
    "Sampled tokens": "Temperature 1, seeds = row numbers, stopping at eos. z of -log p minus entropy under the target's "
    "filtered distribution: N(0, 1) when lossless. Lenience 2 is lossy by intention: what the test sees of it.",
    "The clock": "Greedy, batch 1; total tokens over total time, the prompts' passes included; methods take turns and have all "
    "written the same tokens. Model: acceptance_length / (gamma c + v), with c and v medians of measured passes at the mean "
    "context.",
}


TITLE = "Speculative decoding: exact, and as fast as its model says"


def parts(tables: dict[str, Rows], sizes: dict[str, Any]) -> list[str]:
    """The paragraphs and tables of the page."""
    timed = f"{sizes['timed']} questions, {sizes['timed_new']} tokens each, for the clock"
    lead = (
        "Target: the 4.2M-parameter GSM8K model (4 layers, V = 4096), float32, one thread. A pruned draft is the target's "
        f"first layers, untrained. The {sizes['layers']}-layer target is the same function: output projections of its added "
        f"layers are zero. {sizes['prompts']} GSM8K test questions, {sizes['new']} new tokens each, gamma {GAMMA}; {timed}."
    )
    return [
        lead,
        *(part for name, rows in tables.items() for part in (f"## {name}", NOTES[name], markdown_table(TABLES[name], rows))),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draft", nargs="*", default=[], metavar="NAME=DIR", help="trained drafts of the target")
    parser.add_argument("--quick", action="store_true", help="a few tokens, to see that the script works")
    parser.add_argument("--output", help="write the tables as Markdown to this file")
    arguments = parser.parse_args()
    sizes: dict[str, Any] = SIZES["quick" if arguments.quick else "full"]
    logging.set_verbosity_error()
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    target, prompts = AutoModelForCausalLM.from_pretrained(TARGET).eval(), questions(sizes["prompts"])
    given = dict(one.split("=", 1) for one in arguments.draft)
    trained = {name: AutoModelForCausalLM.from_pretrained(path).eval() for name, path in given.items()}
    cut = {"pruned, 3 of 4 layers": pruned(target, (0, 1, 2))}
    garbage = {"random": random_draft(target), "least likely": opposite(target)}
    deep, small = deeper(target, sizes["layers"]), f"{target.config.num_hidden_layers} layers"
    pairs = {("4 layers", name): (target, draft) for name, draft in (trained or cut).items()}
    pairs |= {(f"{sizes['layers']} layers", name): (deep, draft) for name, draft in {small: target, **cut, **trained}.items()}
    made: dict[str, Callable[[], Rows]] = {
        "Greedy tokens": lambda: greedy_table(target, {**garbage, **cut, **trained}, prompts, sizes),
        "Sampled tokens": lambda: sampling_table(target, trained or cut, prompts, sizes),
        "The clock": lambda: clock_table(pairs, prompts[: sizes["timed"]], sizes),
    }
    tables: dict[str, Rows] = {}
    for name, part in made.items():
        tables[name] = part()
        shown = Table(*TABLES[name], title=name)
        for row in tables[name]:
            shown.add_row(*row)
        Console().print(shown)
    if arguments.output:
        write_results(
            arguments.output, title="Speculative decoding: exact, and as fast as its model says", parts=parts(tables, sizes)
        )


if __name__ == "__main__":
    main()
