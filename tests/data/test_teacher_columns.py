"""The columns about a row's teacher: who it is, and what it alone gets to read."""

from __future__ import annotations

import math
from itertools import accumulate
from typing import Any

import pytest
import torch
from datasets import Dataset
from tokenizers.processors import TemplateProcessing

from kdlib.data import DistillationCollator, Prepared, causal_positions, prepare_dataset, sample_id, teacher_inputs
from kdlib.teachers import HFTeacher
from tests.tiny import CHATML_TEMPLATE, MARKED_TEMPLATE, THINKING_TEMPLATE, tiny_llama, tiny_tokenizer

USER = {"role": "user", "content": "What is two plus two?"}
HINT = {"role": "user", "content": "What is two plus two? Hint: it is four."}
FOUR = {"role": "assistant", "content": "four"}
WHY = {"role": "user", "content": "why?"}


def prepare(rows: list[dict[str, Any]], **options: Any) -> Prepared:
    tokenizer = options.pop("tokenizer", None) or chatty()
    return prepare_dataset(Dataset.from_list(rows), tokenizer, **{"max_length": 256, **options})


def chatty(template: str = CHATML_TEMPLATE) -> Any:
    return tiny_tokenizer(chat_template=template, eos_token="<|im_end|>")


def from_first_scored(row: dict[str, Any]) -> list[int]:
    return row["input_ids"][next(i for i, label in enumerate(row["labels"]) if label != -100) :]


# Who answers ----------------------------------------------------------------------------------------


def texts(count: int) -> list[dict[str, Any]]:
    return [{"text": f"row {i} " + "four apples " * (i % 7), "teacher": "abc"[i % 3] if i % 5 else None} for i in range(count)]


def test_names_stay_with_their_rows() -> None:
    made = prepare([*texts(4), {"text": "", "teacher": "gone"}], skip_bad_rows=True).dataset
    assert made["teacher"][:] == [None, "b", "c", "a"]
    again = prepare_dataset(made, chatty(), max_length=256)
    assert list(again.dataset) == list(made)
    assert "teacher" not in prepare([{"text": "two"}]).dataset.column_names


def test_every_row_of_a_conversation_that_is_cut_up_has_the_name() -> None:
    rows = prepare([{"messages": [USER, FOUR, WHY, FOUR], "teacher": "a"}], tokenizer=chatty(THINKING_TEMPLATE)).dataset
    assert rows["teacher"][:] == ["a", "a"]


def test_packed_rows_have_a_name_per_sample() -> None:
    names = {row["sample_id"]: row["teacher"] for row in prepare(texts(60)).dataset}
    packed = prepare(texts(60), packing=True, max_length=64).dataset
    seen = []
    for row in packed:
        assert len(row["teacher"]) == len(row["sample_id"]) == len(row["seq_lengths"])
        for sample, name, end, length in zip(
            row["sample_id"], row["teacher"], accumulate(row["seq_lengths"]), row["seq_lengths"], strict=True
        ):
            assert name == names[sample]
            assert sample == sample_id(row["input_ids"][end - length : end], row["labels"][end - length : end])
            seen.append(sample)
    assert sorted(seen) == sorted(names) and any(len(row["teacher"]) > 1 for row in packed)
    assert set(packed.column_names) == {"input_ids", "labels", "seq_lengths", "sample_id", "teacher"}


@pytest.mark.parametrize("flatten", [False, True])
@pytest.mark.parametrize("packing", [False, True])
def test_a_batch_has_a_name_per_sample(packing: bool, flatten: bool) -> None:
    rows = list(prepare(texts(12), packing=packing, max_length=64).dataset)
    names = {row["sample_id"]: row["teacher"] for row in prepare(texts(12)).dataset}
    batch = DistillationCollator(0, flatten=flatten)(rows)
    assert batch["teacher"] == [names[sample] for sample in batch["sample_id"].tolist()]


# What it reads --------------------------------------------------------------------------------------


@pytest.mark.parametrize("template", [CHATML_TEMPLATE, MARKED_TEMPLATE])
@pytest.mark.parametrize(
    "row",
    [
        {"messages": [USER, FOUR]},
        {"messages": [USER, FOUR, WHY, FOUR]},
        {"prompt": [USER], "completion": [FOUR]},
        {"prompt": [USER], "completion": "four<|im_end|>"},
    ],
    ids=["messages", "turns", "pair", "raw"],
)
def test_messages_are_rendered_as_the_teacher_is_served(template: str, row: dict[str, Any]) -> None:
    tokenizer = chatty(template)
    own, plain = prepare([{**row, "teacher_prompt": [HINT]}, {**row, "teacher_prompt": None}], tokenizer=tokenizer).dataset
    assert own["teacher_prompt_ids"] == tokenizer.apply_chat_template([HINT], add_generation_prompt=True)["input_ids"]
    assert plain["teacher_prompt_ids"] is None
    hinted = {**row, "messages": [HINT, *row["messages"][1:]]} if "messages" in row else {**row, "prompt": [HINT]}
    (other,) = prepare([hinted], tokenizer=tokenizer).dataset
    assert own["teacher_prompt_ids"] + from_first_scored(own) == other["input_ids"]  # as if the hint were the prompt
    (bare,) = prepare([row], tokenizer=tokenizer).dataset
    assert (own["input_ids"], own["labels"]) == (bare["input_ids"], bare["labels"])
    assert own["sample_id"] != plain["sample_id"] == bare["sample_id"]


def test_text_prompts_and_what_the_tokenizer_puts_around_them() -> None:
    tokenizer = tiny_tokenizer()
    (row,) = prepare(
        [{"prompt": "two plus two?", "completion": " four", "teacher_prompt": "four. two plus two?"}], tokenizer=tokenizer
    ).dataset
    assert row["teacher_prompt_ids"] == tokenizer.encode("four. two plus two?")
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|bos|> $A <|eos|>", special_tokens=[("<|bos|>", 1), ("<|eos|>", 2)]
    )
    around, prompt = prepare(
        [
            {"prompt": "two plus two?", "completion": " four", "teacher_prompt": "four. two plus two?"},
            {"prompt": "two plus two?", "completion": None, "teacher_prompt": "four."},
        ],
        tokenizer=tokenizer,
        prompts_only=True,
    ).dataset
    assert around["teacher_prompt_ids"] == [1, *row["teacher_prompt_ids"]]
    assert prompt["input_ids"] == [1, *tokenizer.encode("two plus two?", add_special_tokens=False)]
    assert prompt["teacher_prompt_ids"] == [1, *tokenizer.encode("four.", add_special_tokens=False)]


def test_prepared_rows_keep_it() -> None:
    made = prepare([{"messages": [USER, FOUR], "teacher_prompt": [HINT]}, {"messages": [USER, FOUR], "teacher_prompt": None}])
    again = prepare_dataset(made.dataset, chatty(), max_length=256)
    assert list(again.dataset) == list(made.dataset)


def test_a_cut_row_keeps_it_whole() -> None:
    row = {"prompt": "two plus two?", "completion": " four" * 20, "teacher_prompt": "four. two plus two?"}
    made = prepare([row], max_length=12)
    assert made.truncated == 1 and len(made.dataset[0]["input_ids"]) == 12
    assert made.dataset[0]["teacher_prompt_ids"] == chatty().encode("four. two plus two?")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"messages": [USER, FOUR], "teacher_prompt": "four"}, "row 0: a teacher_prompt that is not like the prompt"),
        ({"prompt": "two?", "completion": " four", "teacher_prompt": [HINT]}, "row 0: a teacher_prompt that is not like"),
        ({"prompt": "is t", "completion": "wo", "teacher_prompt": "so is t"}, "row 0: .* a prompt that ends within a token"),
        ({"prompt": "two?", "completion": " four", "teacher_prompt": ""}, "row 0: an empty teacher_prompt"),
        ({"prompt": "two?", "completion": " 4", "teacher_prompt": "<|bos|>two?"}, "row 0: only one .* beginning of text"),
        ({"text": "two", "teacher_prompt": "four"}, "teacher_prompt takes the place of a prompt"),
        ({"input_ids": [4, 5], "teacher_prompt": "four"}, "teacher_prompt takes the place of a prompt"),
    ],
)
def test_what_cannot_stand_in_the_prompts_place(row: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        prepare([row])
    assert "\n" not in str(error.value)


def test_conversations_that_are_cut_up_and_packed_rows_are_refused() -> None:
    row = {"messages": [USER, FOUR, WHY, FOUR], "teacher_prompt": [HINT]}
    with pytest.raises(ValueError, match="row 0: teacher_prompt in a conversation that becomes several rows"):
        prepare([row], tokenizer=chatty(THINKING_TEMPLATE))
    with pytest.raises(ValueError, match=r"packing puts several rows into one, .*: leave packing out$"):
        prepare([row], packing=True)


ROWS = [
    {"input_ids": [5, 6, 7, 8, 9], "labels": [-100, -100, 7, -100, 9], "sample_id": 1, "teacher_prompt_ids": [20, 21, 22, 23]},
    {"input_ids": [10, 11, 12], "labels": [-100, 11, 12], "sample_id": 2, "teacher_prompt_ids": None},
    {"input_ids": [13, 14, 15, 16], "labels": [-100, -100, -100, 16], "sample_id": 3, "teacher_prompt_ids": [24]},
]


def test_the_teachers_input_is_its_prompt_and_all_from_the_first_scored_token_on() -> None:
    batch = DistillationCollator(0)(ROWS)
    assert batch["teacher_input_ids"].tolist() == [[20, 21, 22, 23, 7, 8, 9], [10, 11, 12, 0, 0, 0, 0], [24, 16, 0, 0, 0, 0, 0]]
    assert batch["teacher_attention_mask"].tolist() == [[1] * 7, [1] * 3 + [0] * 4, [1] * 2 + [0] * 5]
    where = causal_positions(batch)
    assert where.index.tolist() == [1, 3, 5, 6, 12]
    assert where.teacher_index is not None and where.teacher_index.tolist() == [3, 5, 7, 8, 14]
    inputs, index = teacher_inputs(batch, where)
    after = inputs["input_ids"].flatten()[index + 1]
    assert torch.equal(after, where.labels) and inputs["attention_mask"] is batch["teacher_attention_mask"]


def test_rows_without_one_are_as_they_were() -> None:
    rows = [{**row, "teacher_prompt_ids": None} for row in ROWS]
    batch = DistillationCollator(0)(rows)
    where = causal_positions(batch)
    assert "teacher_input_ids" not in batch and where.teacher_index is None
    inputs, index = teacher_inputs(batch, where)
    assert inputs == batch and index is where.index


@pytest.mark.parametrize("multiple", [None, 8])
def test_a_model_answers_as_if_it_had_been_prompted_so(multiple: int | None) -> None:
    model = tiny_llama(32)
    batch = DistillationCollator(0, pad_to_multiple_of=multiple)(ROWS)
    where = causal_positions(batch)
    found = HFTeacher(model).signal(batch, where).at(slice(None), 1.0).logp
    wanted = []
    for row in ROWS:
        start = next(i for i, label in enumerate(row["labels"]) if label != -100)  # type: ignore[arg-type, var-annotated]
        prompt = row["teacher_prompt_ids"] or row["input_ids"][:start]  # type: ignore[index]
        logits = model(input_ids=torch.tensor([[*prompt, *row["input_ids"][start:]]])).logits[0]  # type: ignore[index, misc]
        scored = [i - start + len(prompt) - 1 for i, x in enumerate(row["labels"]) if x != -100]  # type: ignore[arg-type]
        wanted.append(logits[scored].log_softmax(-1))
    torch.testing.assert_close(found, torch.cat(wanted), rtol=1e-5, atol=1e-5)


# With what it was drawn ------------------------------------------------------------------------------


def test_drawn_log_probs_are_those_of_the_predicted_token() -> None:
    rows = [
        {"input_ids": [5, 6, 7], "labels": [-100, 6, 7], "sample_id": 1, "drawn_logp": [math.nan, -0.5, -1.5]},
        {"input_ids": [8, 9], "labels": [-100, 9], "sample_id": 2},
        {"input_ids": [8, 9], "labels": [-100, 9], "sample_id": 2, "drawn_logp": None},
    ]
    batch = DistillationCollator(0)(rows)
    assert batch["drawn_logp"].dtype == torch.float32 and batch["drawn_logp"].shape == (3, 3)
    drawn = causal_positions(batch).drawn
    assert drawn is not None and drawn[:2].tolist() == [-0.5, -1.5] and drawn[2:].isnan().all()
    plain = DistillationCollator(0)(rows[1:])
    assert "drawn_logp" not in plain and causal_positions(plain).drawn is None
