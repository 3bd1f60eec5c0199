"""Several completions of each problem: metrics and their intervals, what counts as an answer, how models want to be sampled."""

from __future__ import annotations

import itertools
import json
import statistics
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from peft import LoraConfig, get_peft_model
from scipy.stats import binomtest

from kdlib.eval import results_table, summary_rows
from kdlib.eval.results import merged
from kdlib.eval.sampled_comparison import compare, gain_text, gains_table
from kdlib.eval.sampled_defaults import sampling_of
from kdlib.eval.sampled_metrics import Answers, as_results, metric_values, pass_chance
from kdlib.eval.sampled_thinking import Thinking, thinking_of
from tests.tiny import THINKING_TEMPLATE, tiny_llama, tiny_tokenizer

N = 4


def answers(right: list[int]) -> dict[int, Answers]:
    """Problem i has right[i] right answers, i % 3 cut ones and 10 i tokens."""
    return {3 * i: Answers(n=N, right=c, cut=i % 3, tokens=10 * i) for i, c in enumerate(right)}


def results(right: list[int], *, task: str = "sums") -> dict[str, Any]:
    values = metric_values(answers(right), n=N, pass_at=(1, 2, 4))
    return as_results(values, task=task, rows=len(right) + 1, resamples=4000)


def resampled(values: Any, *, draws: int = 20_000) -> tuple[float, float]:
    """Percentile bootstrap of the mean, by hand."""
    values = np.asarray(values, dtype=float)
    chosen = np.random.default_rng(1).integers(0, len(values), size=(draws, len(values)))
    low, high = np.quantile(values[chosen].mean(1), [0.025, 0.975])
    return float(low), float(high)


@pytest.mark.parametrize("k", [1, 2, 3, 4])
@pytest.mark.parametrize("right", [0, 1, 3, 4])
def test_pass_at_k_is_the_mean_over_all_choices(k: int, right: int) -> None:
    drawn = [True] * right + [False] * (N - right)
    assert pass_chance(n=N, right=right, k=k) == pytest.approx(statistics.fmean(map(any, itertools.combinations(drawn, k))))


def test_scores_are_means_over_problems_with_intervals_by_bootstrap() -> None:
    right = [0, 1, 4, 2, 2, 0, 3, 1, 4, 4, 0, 2]
    found = {row["metric"]: row for row in summary_rows(results(right))}
    assert list(found) == ["avg@4", "pass@1", "pass@2", "pass@4", "truncated", "mean_length"]
    assert {row["n"] for row in found.values()} == {12}
    for metric, column in {
        "avg@4": [c / 4 for c in right],
        "pass@4": [float(c > 0) for c in right],
        "truncated": [(i % 3) / 4 for i in range(12)],
        "mean_length": [10 * i / 4 for i in range(12)],
    }.items():
        row = found[metric]
        assert row["value"] == pytest.approx(statistics.fmean(column))
        assert row["stderr"] == pytest.approx(statistics.stdev(column) / 12**0.5)
        spread = row["high"] - row["low"]
        assert (row["low"], row["high"]) == pytest.approx(resampled(column), abs=0.1 * spread)
    assert found["avg@4"]["value"] == found["pass@1"]["value"]
    directions = [found[metric]["higher_is_better"] for metric in ("avg@4", "truncated", "mean_length")]
    assert directions == [True, False, None]


def test_the_majority_is_right_or_shares_the_lead() -> None:
    votes = [({"7": 3, "8": 1}, "7", 1.0), ({"7": 2, "8": 2}, "7", 0.5), ({"7": 1, "8": 3}, "7", 0.0), ({"9": 4}, None, 0.0)]
    found = {i: Answers(n=4, votes=Counter(given), right_vote=right) for i, (given, right, _) in enumerate(votes)}
    found[4] = Answers(n=4)  # no completion had an answer
    values = metric_values(found, n=4, pass_at=())
    assert list(values) == ["avg@4", "maj@4", "truncated", "mean_length"]
    assert list(values["maj@4"].values()) == [*(expected for *_, expected in votes), 0.0]
    assert "maj@4" not in metric_values(answers([1, 2]), n=4, pass_at=())


def test_all_right_has_wilsons_interval_and_one_problem_none() -> None:
    found = {row["metric"]: row for row in summary_rows(results([4] * 10))}
    wilson = binomtest(10, 10).proportion_ci(method="wilson")
    assert (found["avg@4"]["low"], found["avg@4"]["high"]) == pytest.approx((wilson.low, wilson.high))
    single = {row["metric"]: row for row in summary_rows(results([2]))}
    assert (single["avg@4"]["value"], single["avg@4"]["low"], single["avg@4"]["stderr"]) == (0.5, None, None)


def test_gains_are_paired_over_the_problems_that_both_models_have() -> None:
    rng = np.random.default_rng(0)
    base = rng.integers(0, 4, size=60).tolist()
    sft = [c + int(rng.random() < 0.3) for c in base]  # a little better on problems that differ a lot
    teacher = [4] * 50
    compared = compare({"base": results(base), "sft": results(sft), "teacher": results(teacher)}, resamples=4000)
    assert compared["models"] == ["base", "sft", "teacher"]
    row = next(row for row in compared["rows"] if row["metric"] == "avg@4")
    assert (row["task"], row["n"], row["higher_is_better"]) == ("sums", 60, True)
    assert row["values"]["base"]["value"] == pytest.approx(statistics.fmean(base) / 4)
    assert row["gains"].keys() == {"sft", "teacher"}
    gain, differences = row["gains"]["sft"], [(b - a) / 4 for a, b in zip(base, sft, strict=True)]
    assert gain["over"] == "base" and gain["n"] == 60 and gain["value"] == pytest.approx(statistics.fmean(differences))
    assert (gain["low"], gain["high"]) == pytest.approx(resampled(differences), abs=0.005)
    assert gain["low"] > 0 and row["values"]["sft"]["low"] < row["values"]["base"]["high"], "unpaired, it would not show"
    fewer = row["gains"]["teacher"]
    assert (fewer["over"], fewer["n"]) == ("sft", 50)
    assert fewer["value"] == pytest.approx(1 - statistics.fmean(sft[:50]) / 4)
    json.dumps(compared, allow_nan=False)


def test_equal_differences_are_no_certainty() -> None:
    """All right against all wrong: 1 - w sqrt(2) to 1 with w the width of Wilson's interval; equal scores have no interval."""

    def gain(before: list[int], after: list[int]) -> dict[str, Any]:
        compared = compare({"a": results(before), "b": results(after)})
        return next(row for row in compared["rows"] if row["metric"] == "avg@4")["gains"]["b"]

    sure = gain([0] * 10, [4] * 10)
    width = 1.959964**2 / (10 + 1.959964**2)
    assert (sure["value"], sure["low"], sure["high"]) == pytest.approx((1.0, 1 - 2**0.5 * width, 1.0), abs=1e-6)
    same = gain([0] * 10, [0] * 10)
    assert same["value"] == 0 and same["low"] == pytest.approx(-same["high"]) and same["high"] > 0.2
    assert gain([2] * 10, [2] * 10) == {"over": "a", "value": 0.0, "low": None, "high": None, "n": 10}
    assert gain_text(sure) == "+1.000 [+0.608, +1.000]" and gain_text({"value": 0.0, "low": None, "high": None}) == "+0.000"


def test_tables_name_what_they_show() -> None:
    one = {"base": results([0, 1, 2]), "sft": results([2, 3, 4])}
    table = results_table(one)
    assert [column.header for column in table.columns] == ["task", "metric", "n", "base", "sft"]
    gains = gains_table(compare(one))
    assert gains is not None and [column.header for column in gains.columns] == ["task", "metric", "sft over base"]
    assert gains_table(compare({"base": one["base"]})) is None
    both = merged(results([1, 2]), results([3], task="other"))
    assert both["results"].keys() == both["intervals"].keys() == both["per_problem"].keys() == {"sums", "other"}


@pytest.fixture(scope="module")
def thinks() -> Any:
    """A tokenizer with <think> and </think> as tokens that are not special, as Qwen3's are."""
    tokenizer = tiny_tokenizer(chat_template=THINKING_TEMPLATE)
    tokenizer.add_tokens(["<think>", "</think>"])
    return tokenizer


@pytest.mark.parametrize(
    ("prompt", "completion", "answer"),
    [
        ("Two plus two?", "<think>It is 5, no</think>It is 4.", "It is 4."),
        ("Two plus two?", "It is 4.", "It is 4."),
        ("Two plus two?", "<think>It is 4. It is", None),
        ("Two plus two?", "<think>one</think>3<think>two</think>4", "4"),
        ("Two plus two?", "<think>one</think>3<think>two", None),
        ("Two plus two?<think>\n", "It is 5, no</think>It is 4.", "It is 4."),  # opened by the template, as R1's does
        ("Two plus two?<think>\n", "It is 4. It is", None),
        ("Two plus two?<think></think>", "It is 4.", "It is 4."),  # Qwen3 without thinking
        ("Write <think> first. Two?", "It is 4.", "It is 4."),
    ],
)
def test_what_is_thought_is_no_answer(thinks: Any, prompt: str, completion: str, answer: str | None) -> None:
    thinking = thinking_of("auto", thinks)
    assert thinking is not None and (thinking.end, thinking.start) == ("</think>", "<think>")
    ids = [*thinks.encode(completion, add_special_tokens=False), thinks.eos_token_id]
    assert thinking.answer(thinks.encode(prompt), ids) == answer


def test_an_end_that_is_a_special_token_and_one_without_a_start() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"extra_special_tokens": ["[/THINK]", "[THINK]"]})
    thinking = thinking_of("auto", tokenizer)
    assert thinking is not None and thinking.end == "[/THINK]"
    assert thinking.answer([], tokenizer.encode("[THINK]5?[/THINK]4<|eos|>")) == "4"
    bare = Thinking(end="Answer:", tokenizer=tokenizer)
    assert bare.start is None
    assert bare.answer([], tokenizer.encode("5 or 4. Answer: 4")) == " 4"
    assert bare.answer([], tokenizer.encode("5 or 4.")) is None
    assert thinking_of(None, tokenizer) is None and thinking_of("auto", tiny_tokenizer()) is None


def sampled(directory: Path, *, n: int, **given: Any) -> dict[str, Any]:
    found = sampling_of(str(directory), n=n, **{"temperature": None, "top_p": None, "top_k": None, **given})
    return {name: (getattr(found, name), found.source[name]) for name in ("temperature", "top_p", "top_k")}


def test_a_model_is_sampled_as_its_generation_config_says(tmp_path: Path) -> None:
    wants = {"do_sample": True, "temperature": 0.6, "top_p": 0.95, "top_k": 20, "repetition_penalty": 1.05}
    file, default = "generation_config.json", "default"
    (tmp_path / file).write_text(json.dumps(wants))
    theirs = {"temperature": (0.6, file), "top_p": (0.95, file), "top_k": (20, file)}
    assert sampled(tmp_path, n=4) == sampled(tmp_path, n=1) == theirs
    given = sampled(tmp_path, n=4, temperature=0.9, top_k=0)
    assert given == {"temperature": (0.9, "given"), "top_p": (0.95, file), "top_k": (0, "given")}
    greedy = {"temperature": (0.0, "given"), "top_p": (1.0, default), "top_k": (0, default)}
    assert sampled(tmp_path, n=1, temperature=0) == greedy
    found = sampling_of(str(tmp_path), n=4, temperature=None, top_p=None, top_k=None)
    assert found.not_applied == {"repetition_penalty": 1.05}
    assert str(found) == f"temperature 0.6 ({file}), top_p 0.95 ({file}), top_k 20 ({file})"

    plain = {"top_p": (1.0, default), "top_k": (0, default)}
    for config in ({}, {"do_sample": False}):  # a model that says nothing answers greedily, and is sampled at 1 for more
        (tmp_path / file).write_text(json.dumps(config))
        assert sampled(tmp_path, n=1) == {"temperature": (0.0, default), **plain}
        assert sampled(tmp_path, n=4) == {"temperature": (1.0, default), **plain}
    (tmp_path / file).unlink()
    assert sampled(tmp_path, n=4) == {"temperature": (1.0, default), **plain}
    with pytest.raises(ValueError, match=r"^temperature 0 gives the same answer 4 times: leave temperature out, or add --n 1$"):
        sampled(tmp_path, n=4, temperature=0)


def test_an_adapter_is_sampled_as_its_base_model(tmp_path: Path) -> None:
    base = tmp_path / "base"
    tiny_llama(384).save_pretrained(base)
    (base / "generation_config.json").write_text(json.dumps({"do_sample": True, "temperature": 0.7}))
    adapted = get_peft_model(tiny_llama(384), LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    adapted.peft_config["default"].base_model_name_or_path = str(base)
    adapted.save_pretrained(tmp_path / "adapter")
    assert sampled(tmp_path / "adapter", n=2)["temperature"] == (0.7, "generation_config.json")
