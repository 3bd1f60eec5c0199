"""Prompts to be answered, and rows whose completion was generated."""

from __future__ import annotations

import math
from typing import Any

import pytest
from datasets import Dataset

from kdlib.data import Prepared, prepare_dataset, prompt_ids, with_completion
from tests.tiny import CHATML_TEMPLATE, MARKED_TEMPLATE, tiny_tokenizer

USER = {"role": "user", "content": "What is two plus two?"}
FOUR = {"role": "assistant", "content": "four"}
WHY = {"role": "user", "content": "why?"}


def prepare(rows: list[dict[str, Any]], **options: Any) -> Prepared:
    tokenizer = options.pop("tokenizer", None) or chatty()
    return prepare_dataset(Dataset.from_list(rows), tokenizer, **{"max_length": 256, "prompts_only": True, **options})


def chatty(template: str = CHATML_TEMPLATE) -> Any:
    return tiny_tokenizer(chat_template=template, eos_token="<|im_end|>")


def served(messages: list[dict[str, str]]) -> list[int]:
    """What a server would make of the messages."""
    return chatty().apply_chat_template(messages, add_generation_prompt=True)["input_ids"]


ROW = {"input_ids": [5, 6, 7, 8, 9, 10], "labels": [-100, -100, 7, -100, 9, 10], "sample_id": 3, "teacher": "a"}


class TestWithCompletion:
    def test_the_last_turn_is_replaced_and_alone_scored(self) -> None:
        made = with_completion(ROW, [20, 21, 22], logp=[-0.5, -1.0, -2.0])
        assert prompt_ids(ROW) == [5, 6, 7, 8]
        assert made["input_ids"] == [5, 6, 7, 8, 20, 21, 22]
        assert made["labels"] == [-100] * 4 + [20, 21, 22]
        assert all(math.isnan(x) for x in made["drawn_logp"][:4]) and made["drawn_logp"][4:] == [-0.5, -1.0, -2.0]
        assert (made["sample_id"], made["teacher"]) == (3, "a")
        assert ROW["labels"] == [-100, -100, 7, -100, 9, 10]

    def test_what_was_drawn_before_is_forgotten(self) -> None:
        made = with_completion(with_completion(ROW, [20], logp=[-0.5]), [30, 31])
        assert made["input_ids"] == [5, 6, 7, 8, 30, 31] and "drawn_logp" not in made

    def test_a_row_of_nothing_but_a_prompt(self) -> None:
        row = {"input_ids": [5, 6], "labels": [-100, -100], "sample_id": 3}
        assert prompt_ids(row) == [5, 6]
        assert with_completion(row, [7])["input_ids"] == [5, 6, 7]

    def test_the_first_token_is_always_a_prompt(self) -> None:
        assert prompt_ids({"input_ids": [5, 6, 7], "labels": [5, 6, 7]}) == [5]

    def test_the_teachers_prompt_goes_on_with_the_turns_between(self) -> None:
        row = {**ROW, "teacher_prompt_ids": [1, 2, 3]}
        made = with_completion(row, [20])
        assert made["teacher_prompt_ids"] == [1, 2, 3, 7, 8]  # all before the completion but the student's prompt
        again = with_completion(made, [30])
        assert again["teacher_prompt_ids"] == [1, 2, 3, 7, 8]
        unscored = {**row, "labels": [-100] * 6}
        assert with_completion(unscored, [20])["teacher_prompt_ids"] == [1, 2, 3]
        assert with_completion({**row, "teacher_prompt_ids": None}, [20])["teacher_prompt_ids"] is None


class TestPromptsOnly:
    @pytest.mark.parametrize("template", [CHATML_TEMPLATE, MARKED_TEMPLATE])
    @pytest.mark.parametrize("messages", [[USER], [USER, FOUR, WHY], [{"role": "system", "content": "Add."}, USER]])
    def test_messages_that_end_with_the_users_turn(self, template: str, messages: list[dict[str, str]]) -> None:
        (row,) = prepare([{"messages": messages}], tokenizer=chatty(template)).dataset
        assert row["input_ids"] == served(messages)
        assert set(row["labels"]) == {-100} and prompt_ids(row) == row["input_ids"]

    def test_prompts_as_text_and_as_messages(self) -> None:
        (text,) = prepare([{"prompt": "two plus"}]).dataset
        assert text["input_ids"] == chatty().encode("two plus") and set(text["labels"]) == {-100}
        (chat,) = prepare([{"prompt": [USER]}]).dataset
        assert chat["input_ids"] == served([USER])

    def test_completions_that_are_there_are_kept(self) -> None:
        rows = [{"prompt": "two plus", "completion": " two"}, {"prompt": "two plus", "completion": None}]
        whole, bare = prepare(rows).dataset
        (alone,) = prepare(rows[:1], prompts_only=False).dataset
        assert whole == alone and prompt_ids(whole) == bare["input_ids"]
        answered, open_ended = prepare([{"messages": [USER, FOUR]}, {"messages": [USER]}]).dataset
        assert prompt_ids(answered) == open_ended["input_ids"] == served([USER])

    def test_prepared_prompts_stay_as_they_are(self) -> None:
        first = prepare([{"messages": [USER]}, {"messages": [USER, FOUR]}])
        again = prepare_dataset(first.dataset, chatty(), max_length=256, prompts_only=True)
        assert list(again.dataset) == list(first.dataset)

    def test_a_prompt_that_leaves_no_room_is_refused_or_skipped(self) -> None:
        length = len(served([USER]))
        assert len(prepare([{"messages": [USER]}], max_length=length + 1).dataset) == 1
        with pytest.raises(ValueError, match=f"the prompt alone reaches max_length={length}"):
            prepare([{"messages": [USER]}], max_length=length)
        made = prepare([{"messages": [USER]}, {"prompt": None, "messages": [WHY]}], max_length=length, skip_bad_rows=True)
        assert (len(made.dataset), made.skipped, made.truncated) == (1, 1, 0)

    @pytest.mark.parametrize(
        ("row", "message"),
        [
            ({"prompt": ""}, "an empty prompt"),
            ({"messages": []}, "no assistant turn"),
            ({"prompt": None}, "malformed messages"),
        ],
    )
    def test_what_is_no_prompt(self, row: dict[str, Any], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            prepare([row])

    def test_without_it_they_are_refused_with_a_hint(self) -> None:
        for row in ({"prompt": "two"}, {"messages": [USER]}, {"input_ids": [4, 5], "labels": [-100, -100]}):
            with pytest.raises(ValueError, match="on_policy_fraction 1") as error:
                prepare([row], prompts_only=False)
            assert "\n" not in str(error.value)

    def test_it_is_part_of_what_names_prepared_rows(self) -> None:
        rows = Dataset.from_list([{"messages": [USER, FOUR, WHY]}])
        open_ended, scored = (
            prepare_dataset(rows, chatty(), max_length=256, prompts_only=only).dataset for only in (True, False)
        )
        assert open_ended._fingerprint != scored._fingerprint
        assert set(open_ended[0]["labels"]) == {-100} != set(scored[0]["labels"])
