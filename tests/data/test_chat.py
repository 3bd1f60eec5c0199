"""Which tokens of a conversation are scored, for templates of every shape."""

from __future__ import annotations

from importlib.resources import files
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from kdlib.data import prepare_dataset
from tests.tiny import (
    CHATML_TEMPLATE,
    MARKED_TEMPLATE,
    PLAIN_TEMPLATE,
    THINKING_TEMPLATE,
    TOOL_TEMPLATE,
    tiny_tokenizer,
)

GSM8K_LM = Path(__file__).parents[2] / "../shared/models/gsm8k-lm"
USER = {"role": "user", "content": "What is two plus two?"}
FOUR = {"role": "assistant", "content": "The answer is four."}
AGAIN = {"role": "user", "content": "Is the sky blue?"}
YES = {"role": "assistant", "content": "Yes, the sky is blue."}
TWO_TURNS = [{"role": "system", "content": "Be brief."}, USER, FOUR, AGAIN, YES]
THOUGHTS = [
    USER,
    {"role": "assistant", "content": "<think>two and two</think>four"},
    AGAIN,
    {"role": "assistant", "content": "<think>look up</think>yes"},
]
WEATHER = {"type": "function", "function": {"name": "weather", "description": "", "parameters": {}}}


def call(arguments: Any) -> dict[str, Any]:
    return {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"type": "function", "function": {"name": "weather", "arguments": arguments}}],
    }


def tokenizer_with(template: str) -> PreTrainedTokenizerBase:
    return tiny_tokenizer(chat_template=template, eos_token="<|eos|>" if template is PLAIN_TEMPLATE else "<|im_end|>")


def prepared(messages: list[dict[str, Any]], tokenizer: PreTrainedTokenizerBase, **options: Any) -> list[dict[str, Any]]:
    rows = Dataset.from_list([{"messages": messages}], on_mixed_types="use_json")
    return list(prepare_dataset(rows, tokenizer, max_length=4096, **options).dataset)


def scored_texts(row: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The texts of the maximal runs of scored tokens."""
    for token, label in zip(row["input_ids"], row["labels"], strict=True):
        assert label in (-100, token)
    runs = groupby(zip(row["input_ids"], row["labels"], strict=True), key=lambda pair: pair[1] != -100)
    return [tokenizer.decode([token for token, _ in run]) for scored, run in runs if scored]


def rendered(messages: list[dict[str, Any]], tokenizer: PreTrainedTokenizerBase, **options: Any) -> list[int]:
    return tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False, **options)


@pytest.mark.parametrize("template", [PLAIN_TEMPLATE, CHATML_TEMPLATE, MARKED_TEMPLATE])
def test_every_assistant_turn_is_scored_with_its_end(template: str) -> None:
    tokenizer = tokenizer_with(template)
    (row,) = prepared(TWO_TURNS, tokenizer)
    assert row["input_ids"] == rendered(TWO_TURNS, tokenizer)
    end = tokenizer.eos_token
    assert scored_texts(row, tokenizer) == [FOUR["content"] + end, YES["content"] + end]


@pytest.mark.parametrize("tail", [[], [AGAIN]])
def test_user_turns_after_the_last_answer_are_not_scored(tail: list[dict[str, Any]]) -> None:
    tokenizer = tokenizer_with(CHATML_TEMPLATE)
    (row,) = prepared([USER, FOUR, *tail], tokenizer)
    assert scored_texts(row, tokenizer) == [FOUR["content"] + "<|im_end|>"]


def test_marked_and_unmarked_templates_score_the_same_tokens() -> None:
    marked, plain = (prepared(TWO_TURNS, tokenizer_with(t)) for t in (MARKED_TEMPLATE, CHATML_TEMPLATE))
    assert marked == plain


def test_markers_that_leave_out_the_end_of_turn_are_extended_by_it() -> None:
    template = MARKED_TEMPLATE.replace("m['content'] + '<|im_end|>' }}{% endgen", "m['content'] }}{% endgen", 1)
    template = template.replace("{% endgeneration %}", "{% endgeneration %}{{ '<|im_end|>' }}")
    tokenizer = tokenizer_with(template)
    (row,) = prepared(TWO_TURNS, tokenizer)
    assert scored_texts(row, tokenizer) == [FOUR["content"] + "<|im_end|>", YES["content"] + "<|im_end|>"]


def test_template_that_drops_earlier_thinking_gives_a_row_per_turn() -> None:
    tokenizer = tokenizer_with(THINKING_TEMPLATE)
    first, second = prepared(THOUGHTS, tokenizer)
    assert scored_texts(first, tokenizer) == ["<think>two and two</think>four<|im_end|>"]
    assert scored_texts(second, tokenizer) == ["<think>look up</think>yes<|im_end|>"]
    for row, turn in (
        (first, 1),
        (second, 3),
    ):  # what stands before the turn is what the served model is given
        prompt = rendered(THOUGHTS[:turn], tokenizer, add_generation_prompt=True)
        assert row["input_ids"][: len(prompt)] == prompt
        assert row["labels"][: len(prompt)] == [-100] * len(prompt)
    assert "two and two" not in tokenizer.decode(second["input_ids"])


def test_dropped_thinking_with_markers_gives_the_same_rows() -> None:
    opened = "{% if m['role'] == 'assistant' %}{% generation %}{% if"
    text = "{{ parts[-1] + '<|im_end|>' }}"
    closed = text + "{% endgeneration %}{% else %}" + text + "{% endif %}{{ '\n' }}"
    marked = THINKING_TEMPLATE.replace("{% if m['role'] == 'assistant' and", opened)
    marked = marked.replace("{{ parts[-1] + '<|im_end|>\n' }}", closed)
    assert prepared(THOUGHTS, tokenizer_with(marked)) == prepared(THOUGHTS, tokenizer_with(THINKING_TEMPLATE))


def test_one_thinking_turn_stays_one_row() -> None:
    tokenizer = tokenizer_with(THINKING_TEMPLATE)
    (row,) = prepared(THOUGHTS[:2], tokenizer)
    assert row["input_ids"] == rendered(THOUGHTS[:2], tokenizer)


def test_template_kwargs_move_what_the_prompt_already_holds() -> None:
    tokenizer = tokenizer_with(THINKING_TEMPLATE)
    (thinking,) = prepared([USER, FOUR], tokenizer)
    (silent,) = prepared([USER, FOUR], tokenizer, chat_template_kwargs={"enable_thinking": False})
    assert scored_texts(thinking, tokenizer) == ["<think></think>" + FOUR["content"] + "<|im_end|>"]
    assert scored_texts(silent, tokenizer) == [FOUR["content"] + "<|im_end|>"]


def test_a_rows_own_kwargs_and_tools_win() -> None:
    tokenizer = tokenizer_with(THINKING_TEMPLATE)
    rows = Dataset.from_list(
        [
            {"messages": [USER, FOUR], "chat_template_kwargs": {"enable_thinking": False}},
            {"messages": [USER, FOUR], "chat_template_kwargs": None},
        ]
    )
    options = {"chat_template_kwargs": {"enable_thinking": True}}
    own, common = prepare_dataset(rows, tokenizer, max_length=99, **options).dataset
    assert scored_texts(own, tokenizer) == [FOUR["content"] + "<|im_end|>"]
    assert scored_texts(common, tokenizer) == ["<think></think>" + FOUR["content"] + "<|im_end|>"]

    tokenizer = tokenizer_with(TOOL_TEMPLATE)
    rows = Dataset.from_list([{"messages": [USER, FOUR], "tools": '[{"name": "own"}]'}])
    (row,) = prepare_dataset(rows, tokenizer, max_length=999, tools=[WEATHER]).dataset
    assert '"own"' in tokenizer.decode(row["input_ids"]) and "weather" not in tokenizer.decode(row["input_ids"])


@pytest.mark.parametrize("arguments", [{"city": "Rome"}, '{"city": "Rome"}'])
def test_tool_calls_are_scored_and_tool_results_are_not(arguments: Any) -> None:
    tokenizer = tokenizer_with(TOOL_TEMPLATE)
    result = {"role": "tool", "content": "sunny"}
    other = call({"day": "Monday"})  # its key must not reach the first call through the table's schema
    messages = [USER, call(arguments), result, other, result, YES]
    (row,) = prepared(messages, tokenizer, tools=[WEATHER])
    assert scored_texts(row, tokenizer) == [
        '<call>weather {"city": "Rome"}</call><|im_end|>',
        '<call>weather {"day": "Monday"}</call><|im_end|>',
        YES["content"] + "<|im_end|>",
    ]


def test_nulls_of_the_tables_schema_do_not_reach_the_template() -> None:
    tokenizer = tokenizer_with(TOOL_TEMPLATE)
    rows = Dataset.from_list([{"messages": [USER, call({"city": "Rome"}), call({"day": "Monday"})]}])
    (row,) = prepare_dataset(rows, tokenizer, max_length=999, tools=[WEATHER]).dataset
    assert '{"city": "Rome"}' in tokenizer.decode(row["input_ids"])


def test_a_template_that_drops_tool_calls_is_refused() -> None:
    with pytest.raises(ValueError, match="row 0: the chat template drops tool calls"):
        prepared([USER, call({"city": "Rome"})], tokenizer_with(CHATML_TEMPLATE))


def test_a_conversation_that_starts_with_a_tool_call_is_refused() -> None:
    with pytest.raises(ValueError, match="row 0: the conversation starts with an assistant turn"):
        prepared([call({"city": "Rome"})], tokenizer_with(TOOL_TEMPLATE))


def test_a_prompt_the_template_does_not_keep_is_refused_and_its_fix_works() -> None:
    template = CHATML_TEMPLATE.replace("assistant\n' }}", "assistant\n<think>' }}")
    tokenizer = tokenizer_with(template)
    with pytest.raises(ValueError, match=r"row 0: the chat template's generation prompt .* `completion` as the text"):
        prepared([USER, FOUR], tokenizer)
    rows = Dataset.from_list([{"prompt": [USER], "completion": "so</think>four"}])
    (row,) = prepare_dataset(rows, tokenizer, max_length=99).dataset
    assert scored_texts(row, tokenizer) == ["so</think>four<|im_end|>"]
    assert tokenizer.decode(row["input_ids"]).endswith("assistant\n<think>so</think>four<|im_end|>")


def test_only_the_completions_turns_are_scored() -> None:
    for template in (CHATML_TEMPLATE, MARKED_TEMPLATE):
        tokenizer = tokenizer_with(template)
        rows = Dataset.from_list([{"prompt": [USER, FOUR, AGAIN], "completion": [YES]}])
        (row,) = prepare_dataset(rows, tokenizer, max_length=99).dataset
        assert row["input_ids"] == rendered([USER, FOUR, AGAIN, YES], tokenizer)
        assert scored_texts(row, tokenizer) == [YES["content"] + "<|im_end|>"]


def test_without_an_end_of_turn_token_the_line_break_is_the_end() -> None:
    template = "{% for m in messages %}{{ '# ' + m['role'] + '\n' + m['content'] + '\n' }}{% endfor %}"
    template += "{% if add_generation_prompt %}{{ '# assistant\n' }}{% endif %}"
    tokenizer = tokenizer_with(template)
    (row,) = prepared(TWO_TURNS, tokenizer)
    assert row["input_ids"] == rendered(TWO_TURNS, tokenizer)
    assert scored_texts(row, tokenizer) == [FOUR["content"] + "\n", YES["content"] + "\n"]


def test_text_parts_are_joined() -> None:
    tokenizer = tokenizer_with(CHATML_TEMPLATE)
    parts = [{"type": "text", "text": "What is"}, {"type": "text", "text": "two plus two?"}]
    joined = {"role": "user", "content": "What is\ntwo plus two?"}
    assert prepared([{"role": "user", "content": parts}, FOUR], tokenizer) == prepared([joined, FOUR], tokenizer)


turns = st.lists(st.tuples(st.text("ab \n.ü☃", max_size=12), st.text("ab \n.ü☃", max_size=12)), min_size=1, max_size=4)


@settings(max_examples=60, deadline=None)
@given(turns)
def test_any_conversation_is_scored_turn_by_turn(pairs: list[tuple[str, str]]) -> None:
    tokenizer = tokenizer_with(CHATML_TEMPLATE)
    messages = [
        message
        for question, answer in pairs
        for message in ({"role": "user", "content": question}, {"role": "assistant", "content": f"x{answer}"})
    ]
    (row,) = prepared(messages, tokenizer)
    assert row["input_ids"] == rendered(messages, tokenizer)
    assert scored_texts(row, tokenizer) == [f"x{answer}<|im_end|>" for _, answer in pairs]


@pytest.mark.parametrize(
    ("name", "count"),
    [("qwen2_5", 1), ("llama3_1", 1), ("gemma3", 1), ("glm4moe", 2), ("qwen3", 2), ("gptoss", 2)],
)
def test_published_templates(name: str, count: int) -> None:
    """As served: each row's unscored start is the prompt, and every answer is scored once."""
    tokenizer = tokenizer_with((files("trl") / "chat_templates" / f"{name}.jinja").read_text())
    rows = prepared(THOUGHTS, tokenizer)
    assert len(rows) == count
    scored = [text for row in rows for text in scored_texts(row, tokenizer)]
    assert [("four" in text, "yes" in text) for text in scored] == [(True, False), (False, True)]
    for row, turn in zip(rows, (1, 3)[-count:] if count == 2 else (1,), strict=True):
        prompt = rendered(THOUGHTS[:turn], tokenizer, add_generation_prompt=True)
        assert row["input_ids"][: len(prompt)] == prompt and set(row["labels"][: len(prompt)]) == {-100}


def test_a_trained_models_own_template() -> None:
    if not GSM8K_LM.is_dir():
        pytest.skip(f"needs the model in {GSM8K_LM}")
    tokenizer = AutoTokenizer.from_pretrained(GSM8K_LM)
    (row,) = prepared([USER, FOUR, AGAIN, YES], tokenizer)
    assert row["input_ids"] == rendered([USER, FOUR, AGAIN, YES], tokenizer)
    assert row["input_ids"][0] == tokenizer.bos_token_id
    assert scored_texts(row, tokenizer) == [FOUR["content"] + "<|eos|>", YES["content"] + "<|eos|>"]
