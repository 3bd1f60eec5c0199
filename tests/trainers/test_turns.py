"""What ends a turn, and in which mode it opens, compared between student and teacher."""

from __future__ import annotations

import pytest

from kdlib.trainers import turns
from tests.tiny import CHATML_TEMPLATE, PLAIN_TEMPLATE, THINKING_TEMPLATE, tiny_tokenizer

CHATML = tiny_tokenizer(chat_template=CHATML_TEMPLATE)
PLAIN = tiny_tokenizer(chat_template=PLAIN_TEMPLATE)
BARE = tiny_tokenizer(chat_template=None)


def test_a_turn_ends_with_what_the_template_closes_it_with() -> None:
    assert turns.end_of_turn(CHATML, {}) == CHATML.convert_tokens_to_ids("<|im_end|>")
    assert turns.end_of_turn(PLAIN, {}) == PLAIN.eos_token_id
    assert turns.end_of_turn(BARE, {}) is None


def test_rollouts_end_after_any_of_the_tokens_that_end_turns() -> None:
    assert turns.stop_ids(2, CHATML, {}) == (2, CHATML.convert_tokens_to_ids("<|im_end|>"))
    assert turns.stop_ids([2, 5], BARE, {}) == (2, 5)
    assert turns.stop_ids(None, BARE, {}) == (2,)


def test_without_any_such_token_rollouts_are_refused() -> None:
    bare = tiny_tokenizer(chat_template=None)
    bare.eos_token = None
    with pytest.raises(ValueError, match="no token that ends a turn"):
        turns.stop_ids(None, bare, {})


def test_a_base_student_of_a_chat_teacher_is_told_how_to_end_its_turns() -> None:
    (line,) = turns.compare(BARE, CHATML, {})
    assert "<|im_end|>" in line and "chat template" in line
    assert turns.compare(CHATML, CHATML, {}) == []


def test_different_thinking_modes_are_told() -> None:
    thinking = tiny_tokenizer(chat_template=THINKING_TEMPLATE)
    always = tiny_tokenizer(chat_template=THINKING_TEMPLATE.replace("and not enable_thinking", ""))
    (line,) = turns.compare(thinking, always, {"enable_thinking": True})
    assert "thinking" in line and "enable_thinking" in line
    assert turns.compare(thinking, always, {"enable_thinking": False}) == []
