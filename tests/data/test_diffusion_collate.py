"""The batch of a diffusion model's rows against plain loops: learnt padding, ranks, commit steps, and nothing of its mates."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st

from kdlib.data import prepare_dataset
from kdlib.data.diffusion import DiffusionCollator
from tests.cli.conftest import conversation
from tests.tiny import CHATML_TEMPLATE, tiny_tokenizer

PAD, EOS, TURN_END = 0, 2, 3


@st.composite
def token_rows(draw: st.DrawFn) -> list[dict[str, Any]]:
    """Rows with a prompt, spans of labels, and commit steps; some end with an end token, some with what is not scored."""
    rows = []
    for number in range(draw(st.integers(1, 4))):
        scored = [False, *draw(st.lists(st.booleans(), max_size=12)), True, *draw(st.sampled_from([[], [False], [False] * 3]))]
        ids = [draw(st.integers(4, 9)) for _ in scored]
        last = max(i for i, score in enumerate(scored) if score)
        ids[last] = draw(st.sampled_from([EOS, TURN_END, 9]))
        labels = [token if score else -100 for token, score in zip(ids, scored, strict=True)]
        steps = draw(st.lists(st.integers(1, 20), min_size=sum(scored), max_size=sum(scored)))
        rows.append({"input_ids": ids, "labels": labels, "sample_id": number + 7, "commit_step": steps})
    return rows


@st.composite
def collators(draw: st.DrawFn) -> DiffusionCollator:
    return DiffusionCollator(
        PAD,
        eos_token_id=draw(st.sampled_from([EOS, EOS, None])),
        eos_padding=draw(st.sampled_from(["none", "block", "length"])),
        block_length=draw(st.integers(1, 6)),
        max_length=draw(st.integers(14, 30)),
        response_length=draw(st.sampled_from([None, 4, 20])),
        blocks_from=draw(st.sampled_from(["response", "sequence"])),
        end_token_ids=draw(st.sampled_from([(), (TURN_END,)])),
    )


def by_loops(row: dict[str, Any], collator: DiffusionCollator) -> dict[str, list[int]]:
    """The row as the batch should have it, without trailing padding."""
    ids, labels = list(row["input_ids"]), list(row["labels"])
    while labels[-1] == -100:
        ids.pop()
        labels.pop()
    steps = list(row["commit_step"])
    start = next(i for i, label in enumerate(labels) if label != -100)
    ended = collator.eos_token_id is not None and ids[-1] in {collator.eos_token_id, *collator.end_token_ids}
    while ended and len(ids) < collator.max_length:
        response = sum(label != -100 for label in labels)
        column = response + (start if collator.blocks_from == "sequence" else 0)
        if collator.eos_padding == "none" or (collator.eos_padding == "block" and column % collator.block_length == 0):
            break
        if collator.eos_padding == "length" and collator.response_length is not None and response >= collator.response_length:
            break
        ids.append(EOS)
        labels.append(EOS)
        steps.append(steps[-1])
    ranks, commits = [], []
    for label in labels:
        scored = label != -100
        ranks.append(sum(rank >= 0 for rank in ranks) if scored else -1)
        commits.append(steps[ranks[-1]] if scored else 0)
    return {"input_ids": ids, "labels": labels, "rank": ranks, "commit_step": commits}


@given(token_rows(), collators())
def test_the_batch_is_that_of_plain_loops(rows: list[dict[str, Any]], collator: DiffusionCollator) -> None:
    batch, expected = collator(rows), [by_loops(row, collator) for row in rows]
    width = max(len(row["input_ids"]) for row in expected)
    fills = {"input_ids": PAD, "labels": -100, "rank": -1, "commit_step": 0}
    for name, fill in fills.items():
        table = [row[name] + [fill] * (width - len(row[name])) for row in expected]
        assert batch[name].tolist() == table and batch[name].dtype == torch.int64, name
    lengths = torch.tensor([len(row["input_ids"]) for row in expected])
    assert torch.equal(batch["attention_mask"], (torch.arange(width) < lengths[:, None]).long())
    assert batch["sequence"].tolist() == [[number] * width for number in range(len(rows))]
    assert batch["sample_id"].tolist() == [row["sample_id"] for row in rows]


@given(token_rows(), collators())
def test_a_row_is_the_same_with_and_without_mates(rows: list[dict[str, Any]], collator: DiffusionCollator) -> None:
    together = collator(rows)
    for number, row in enumerate(rows):
        alone = collator([row])
        size = alone["input_ids"].shape[1]
        for name in ("input_ids", "attention_mask", "labels", "rank", "commit_step"):
            assert torch.equal(together[name][number, :size], alone[name][0]), name
        assert not together["attention_mask"][number, size:].any()


def collated(rows: list[dict[str, Any]], **options: Any) -> dict[str, torch.Tensor]:
    settings: dict[str, Any] = {"eos_token_id": EOS, "eos_padding": "length", "block_length": 8, "max_length": 64} | options
    return DiffusionCollator(PAD, **settings)(rows)


def test_prepared_rows_of_texts_and_chats() -> None:
    """A text is all response but its first token; a template's line break behind an answer is not read."""
    tokenizer = tiny_tokenizer(chat_template=CHATML_TEMPLATE, eos_token="<|im_end|>")
    chat = prepare_dataset(Dataset.from_list([conversation("Is the sky blue?", "Yes.")]), tokenizer, max_length=64).dataset
    end = tokenizer.eos_token_id
    assert chat[0]["labels"][-1] == -100 and chat[0]["labels"][-2] == end, "or this test says nothing of what follows an end"
    batch = collated(list(chat), eos_token_id=end, eos_padding="block")
    answer = batch["input_ids"][0][batch["labels"][0] != -100].tolist()
    assert len(answer) == 8 and tokenizer.decode(answer).startswith("Yes.<|im_end|><|im_end|>")
    text = prepare_dataset(Dataset.from_dict({"text": ["The sky"]}), tokenizer, max_length=64).dataset
    whole = collated(list(text), eos_token_id=end, max_length=10)
    assert whole["rank"].tolist() == [[-1, *range(9)]] and "commit_step" not in whole
    assert whole["input_ids"][0, len(text[0]["input_ids"]) - 1 :].unique().tolist() == [end]


@pytest.mark.parametrize("padding", ["block", "length"])
def test_a_response_that_was_cut_and_a_prompt_alone_get_no_padding(padding: str) -> None:
    cut = {"input_ids": [5, 6, 7], "labels": [-100, 6, 7], "sample_id": 0}
    asked = {"input_ids": [5, 6, EOS], "labels": [-100, -100, -100], "sample_id": 1}
    batch = collated([cut, asked], eos_padding=padding)
    assert batch["input_ids"].tolist() == [[5, 6, 7], [5, 6, EOS]] and batch["rank"].tolist() == [[-1, 0, 1], [-1, -1, -1]]


def test_a_rows_teacher_stays_with_it() -> None:
    rows = [{"input_ids": [5, EOS], "labels": [-100, EOS], "sample_id": i, "teacher": f"t{i}"} for i in range(2)]
    assert collated(rows)["teacher"] == ["t0", "t1"]
