"""The made word problems are true, their splits disjoint, and one tokenizer reads all of them word by word."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from itertools import pairwise
from typing import Any

import jinja2
import pytest
import torch

from kdlib.data.arithmetic import make_problems
from kdlib.data.arithmetic_models import PIECES, make_model, make_tokenizer
from kdlib.eval.arithmetic_task import arithmetic_task

EQUATION = re.compile(r"(\d+) ([+-]) (\d+) = (\d+)")
LESS = re.compile(r"\b(loses|gives|takes)\b")
MAX_LENGTH = 128  # of the demo
MAKE = """
import json
from kdlib.data.arithmetic import make_problems
from kdlib.data.arithmetic_models import make_tokenizer
print(json.dumps([make_problems(40, seed=5, split="test", slips=0.2), make_tokenizer().get_vocab()]))
"""


def solution(problem: dict[str, Any]) -> str:
    return problem["messages"][1]["content"]


def equations(text: str) -> list[tuple[int, str, int, int]]:
    return [(int(left), op, int(right), int(result)) for left, op, right, result in EQUATION.findall(text)]


def true_result(left: int, op: str, right: int) -> int:
    return left + right if op == "+" else left - right


def told_by_the_question(question: str) -> list[int]:
    """The numbers a reader of the question arrives at, sentence by sentence."""
    begin, *events = [sentence for sentence in question.split(".") if re.search(r"\d", sentence)]
    values = [int(re.findall(r"\d+", begin)[0])]
    for event in events:
        (number,) = map(int, re.findall(r"\d+", event))
        values.append(values[-1] - number if LESS.search(event) else values[-1] + number)
    return values


class TestProblems:
    @pytest.mark.parametrize("split", ["train", "test"])
    def test_the_answer_follows_from_the_question_alone(self, split: Any) -> None:
        for problem in make_problems(1000, seed=3, split=split, slips=0.3):
            start, *results = told_by_the_question(problem["question"])
            steps = [equations(step)[0] for step in problem["steps"]]
            assert len(steps) >= 2
            assert [result for *_, result in steps] == results
            assert [steps[0][0], *(result for *_, result in steps[:-1])] == [left for left, *_ in steps]
            assert steps[0][0] == start
            assert problem["answer"] == str(results[-1])
            assert all(true_result(left, op, right) == result for left, op, right, result in steps)

    def test_a_solution_without_slips_tells_the_steps_and_ends_in_the_answer(self) -> None:
        for problem in make_problems(1000, seed=1, split="train"):
            text, end = solution(problem).split("\n#### ")
            assert [match[0] for match in EQUATION.finditer(text)] == problem["steps"]
            assert end == problem["answer"]

    def test_a_row_is_a_question_and_one_answer(self) -> None:
        (problem,) = make_problems(1, seed=0, split="train")
        assert [message["role"] for message in problem["messages"]] == ["user", "assistant"]
        assert problem["messages"][0]["content"] == problem["question"]
        assert json.loads(json.dumps(problem)) == problem

    def test_slips_are_as_frequent_as_asked_small_and_carried_on(self) -> None:
        told = [equations(solution(problem)) for problem in make_problems(3000, seed=2, split="train", slips=0.2)]
        off = [result - true_result(left, op, right) for steps in told for left, op, right, result in steps]
        assert sum(map(bool, off)) / len(off) == pytest.approx(0.2, abs=0.02)
        assert set(off) == {-2, -1, 0, 1, 2}
        assert all(following[0] == before[3] for steps in told for before, following in pairwise(steps))

    def test_slips_change_neither_the_questions_nor_the_answers_of_a_row(self) -> None:
        for problem in make_problems(500, seed=2, split="train", slips=1.0):
            assert problem["answer"] == str(told_by_the_question(problem["question"])[-1])
            assert solution(problem).endswith(f"\n#### {equations(solution(problem))[-1][3]}")

    def test_no_chain_of_calculations_is_in_both_splits_whatever_the_seeds(self) -> None:
        def chains(split: Any) -> set[tuple[str, ...]]:
            return {tuple(problem["steps"]) for seed in range(3) for problem in make_problems(2000, seed=seed, split=split)}

        train, test = chains("train"), chains("test")
        assert len(test) > 100
        assert not train & test

    def test_questions_differ_and_a_longer_list_starts_with_the_shorter(self) -> None:
        many = make_problems(3000, seed=0, split="train", slips=0.2)
        assert len({problem["question"] for problem in many}) == 3000
        assert make_problems(50, seed=0, split="train", slips=0.2) == many[:50]

    def test_the_seed_decides(self) -> None:
        assert make_problems(20, seed=0, split="train") != make_problems(20, seed=1, split="train")

    def test_another_process_with_another_hash_seed_makes_the_same(self) -> None:
        ran = subprocess.run(
            [sys.executable, "-c", MAKE],
            env={**os.environ, "PYTHONHASHSEED": "12345"},
            capture_output=True,
            text=True,
            check=True,
        )
        assert json.loads(ran.stdout) == [make_problems(40, seed=5, split="test", slips=0.2), make_tokenizer().get_vocab()]

    def test_an_unknown_split_is_refused(self) -> None:
        with pytest.raises(ValueError, match="use 'train' or 'test'"):
            make_problems(1, seed=0, split="validation")  # type: ignore[arg-type]


class TestTokenizer:
    tokenizer = make_tokenizer()

    @pytest.mark.parametrize("split", ["train", "test"])
    def test_every_text_comes_back_and_every_word_is_one_token(self, split: Any) -> None:
        texts = [m["content"] for p in make_problems(3000, seed=11, split=split, slips=0.2) for m in p["messages"]]
        for text, ids in zip(texts, self.tokenizer(texts, add_special_tokens=False)["input_ids"], strict=True):
            assert self.tokenizer.decode(ids) == text
            assert len(ids) == len(re.findall(PIECES, text))

    def test_digits_are_tokens_of_their_own(self) -> None:
        ids = self.tokenizer.encode("Mia has 17 apples.", add_special_tokens=False)
        assert [self.tokenizer.decode([token]) for token in ids] == ["Mia", " has", " 1", "7", " apples", "."]

    def test_text_that_the_generator_never_writes_comes_back_too(self) -> None:
        text = "Zoë's 3 kiwis — 漢字\n\ttabs  and CAPITALS"
        assert self.tokenizer.decode(self.tokenizer.encode(text, add_special_tokens=False)) == text

    def test_a_saved_tokenizer_is_the_same(self, tmp_path: Any) -> None:
        from transformers import AutoTokenizer

        self.tokenizer.save_pretrained(tmp_path)
        loaded = AutoTokenizer.from_pretrained(tmp_path)
        messages = make_problems(1, seed=0, split="test")[0]["messages"]
        rendered = self.tokenizer.apply_chat_template(messages)
        assert loaded.apply_chat_template(messages) == rendered
        assert loaded.get_vocab() == self.tokenizer.get_vocab()
        assert loaded.special_tokens_map == self.tokenizer.special_tokens_map

    def test_the_template_marks_turns_with_single_tokens(self) -> None:
        messages = [{"role": "user", "content": "7"}, {"role": "assistant", "content": "7"}]
        pieces = self.tokenizer.tokenize(self.tokenizer.apply_chat_template(messages, tokenize=False))
        assert pieces == ["<|bos|>", "<|user|>", "7", "<|end|>", "<|assistant|>", "7", "<|end|>"]

    def test_rows_fit_the_demo(self) -> None:
        rows = [problem["messages"] for problem in make_problems(3000, seed=7, split="train", slips=0.2)]
        lengths = [len(ids) for ids in self.tokenizer.apply_chat_template(rows, return_dict=True)["input_ids"]]
        assert max(lengths) <= MAX_LENGTH


class TestTask:
    tokenizer = make_tokenizer()

    def test_the_prompt_is_the_chat_templates(self, tmp_path: Any) -> None:
        (problem,) = make_problems(1, seed=0, split="test")
        prompt = jinja2.Template(arithmetic_task(tmp_path / "test.jsonl")["doc_to_text"]).render(problem)
        rendered = self.tokenizer.apply_chat_template(problem["messages"][:1], add_generation_prompt=True, tokenize=False)
        assert prompt == rendered

    def test_the_filter_finds_the_final_number_and_the_limit_leaves_room(self, tmp_path: Any) -> None:
        task = arithmetic_task(tmp_path / "test.jsonl")
        pattern = task["filter_list"][0]["filter"][0]["regex_pattern"]
        for problem in make_problems(500, seed=4, split="test"):
            assert re.findall(pattern, solution(problem)) == [problem["answer"]]
            length = len(self.tokenizer.encode(solution(problem), add_special_tokens=False)) + 1
            assert length <= task["generation_kwargs"]["max_gen_toks"]

    def test_a_turn_ends_with_the_token_at_which_generation_stops(self, tmp_path: Any) -> None:
        assert arithmetic_task(tmp_path / "test.jsonl")["generation_kwargs"]["until"] == [self.tokenizer.eos_token]


class TestModels:
    tokenizer = make_tokenizer()

    def test_the_student_is_several_times_smaller(self) -> None:
        teacher, student = (make_model(kind, self.tokenizer, seed=0).num_parameters() for kind in ("teacher", "student"))
        assert 4 * student < teacher < 1_000_000

    def test_the_seed_decides_the_weights(self) -> None:
        first, again, other = (make_model("student", self.tokenizer, seed=seed).model.embed_tokens.weight for seed in (0, 0, 1))
        assert torch.equal(first, again)
        assert not torch.equal(first, other)

    def test_a_row_passes_through(self) -> None:
        model = make_model("student", self.tokenizer, seed=0)
        ids = self.tokenizer.apply_chat_template(
            make_problems(1, seed=0, split="train")[0]["messages"], return_dict=True, return_tensors="pt"
        )["input_ids"]
        assert model(input_ids=ids).logits.shape == (*ids.shape, len(self.tokenizer))
