"""Rows without a chat template, truncation, packing, and what is refused."""

from __future__ import annotations

from itertools import accumulate
from typing import Any

import numpy as np
import pytest
import xxhash
from datasets import Dataset
from tokenizers.processors import TemplateProcessing

from kdlib.data import Prepared, prepare_dataset
from tests.tiny import CHATML_TEMPLATE, THINKING_TEMPLATE, tiny_tokenizer

USER = {"role": "user", "content": "What is two plus two?"}
FOUR = {"role": "assistant", "content": "four"}
EOS = 2


def prepare(rows: list[dict[str, Any]], **options: Any) -> Prepared:
    tokenizer = options.pop("tokenizer", None) or tiny_tokenizer()
    return prepare_dataset(Dataset.from_list(rows), tokenizer, **{"max_length": 512, **options})


def one(row: dict[str, Any], **options: Any) -> dict[str, Any]:
    (made,) = prepare([row], **options).dataset
    return made


def scored(row: dict[str, Any]) -> list[int]:
    return [token for token, label in zip(row["input_ids"], row["labels"], strict=True) if label == token]


def words(count: int) -> list[dict[str, Any]]:
    """Texts of different lengths, no two alike."""
    return [{"text": f"row {i} " + "four apples " * (i % 13)} for i in range(count)]


class TestText:
    def test_all_but_the_first_token_is_scored_and_it_ends(self) -> None:
        ids = tiny_tokenizer().encode("two plus two")
        row = one({"text": "two plus two"})
        assert row["input_ids"] == [*ids, EOS]
        assert row["labels"] == [-100, *ids[1:], EOS]

    def test_an_end_that_is_there_is_not_doubled(self) -> None:
        assert one({"text": "two plus two<|eos|>"}) == one({"text": "two plus two"})

    def test_no_end_is_made_up_for_a_tokenizer_without_one(self) -> None:
        tokenizer = tiny_tokenizer()
        tokenizer.eos_token = None
        assert one({"text": "two plus two"}, tokenizer=tokenizer)["input_ids"] == tokenizer.encode("two plus two")

    def test_the_tokenizers_beginning_comes_once(self) -> None:
        tokenizer = tiny_tokenizer()
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<|bos|> $A", special_tokens=[("<|bos|>", 1)])
        plain, rendered = (one({"text": text}, tokenizer=tokenizer) for text in ("two", "<|bos|>two"))
        assert plain == rendered and plain["input_ids"][:2] != [1, 1] and plain["input_ids"][0] == 1


class TestPromptAndCompletion:
    def test_the_completion_is_scored_and_ends(self) -> None:
        tokenizer = tiny_tokenizer()
        row = one({"prompt": "What is two plus two?", "completion": " four"})
        assert row["input_ids"] == [*tokenizer.encode("What is two plus two? four"), EOS]
        assert scored(row) == [*tokenizer.encode(" four"), EOS]

    def test_a_token_across_the_boundary_is_scored(self) -> None:
        tokenizer = tiny_tokenizer()
        whole, prompt = tokenizer.encode("is two"), tokenizer.encode("is t")
        assert whole[: len(prompt)] != prompt  # or the test shows nothing
        row = one({"prompt": "is t", "completion": "wo"})
        assert row["input_ids"] == [*whole, EOS]
        assert tokenizer.decode(scored(row)) == " two<|eos|>"


class TestTokens:
    def test_scored_by_labels_mask_or_everywhere(self) -> None:
        ids = [5, 6, 7, 8]
        by_labels = one({"input_ids": ids, "labels": [-100, -100, 7, 8]})
        by_mask = one({"input_ids": ids, "completion_mask": [0, 0, 1, 1]})
        assert by_labels == by_mask and by_labels["labels"] == [-100, -100, 7, 8]
        assert one({"input_ids": ids})["labels"] == [-100, 6, 7, 8]
        assert by_labels["input_ids"] == ids

    def test_prepared_rows_stay_as_they_are(self) -> None:
        first = prepare(words(5))
        again = prepare_dataset(first.dataset, tiny_tokenizer(), max_length=512)
        assert list(again.dataset) == list(first.dataset)

    @pytest.mark.parametrize(
        ("row", "message"),
        [
            (
                {"input_ids": [5, 6, 7], "labels": [6, 7, -100]},
                "row 0: labels that are neither -100 nor the token's",
            ),
            (
                {"input_ids": [5, 6, 7], "completion_mask": [0, 1]},
                "row 0: labels or completion_mask of another length",
            ),
            ({"input_ids": [5, 6, 7], "labels": [-100, -100, -100]}, "row 0: no scored token"),
        ],
    )
    def test_bad_tokens(self, row: dict[str, Any], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            prepare([row])


def test_sample_ids_are_hashes_of_the_content() -> None:
    row = one({"text": "two plus two"})
    content = np.array(row["input_ids"] + row["labels"], dtype=np.int64).tobytes()
    assert row["sample_id"] == xxhash.xxh64_intdigest(content) % 2**63
    ids = prepare([{"text": "a b"}, {"text": "two"}, {"text": "a b"}]).dataset["sample_id"][:]
    assert ids[0] == ids[2] != ids[1]


class TestTruncation:
    def test_the_cut_keeps_the_first_tokens_and_teaches_no_end(self) -> None:
        whole = one({"text": "two plus two make four"})
        length = len(whole["input_ids"]) - 1
        made = prepare([{"text": "two plus two make four"}, {"text": "two"}], max_length=length)
        assert made.truncated == 1 and made.skipped == 0
        assert made.dataset[0]["input_ids"] == whole["input_ids"][:length]
        assert made.dataset[0]["labels"] == whole["labels"][:length]
        assert EOS not in made.dataset[0]["input_ids"]

    def test_a_row_of_exactly_max_length_is_whole(self) -> None:
        whole = one({"text": "two plus two"})
        made = prepare([{"text": "two plus two"}], max_length=len(whole["input_ids"]))
        assert made.truncated == 0 and made.dataset[0] == whole

    def test_a_later_turn_that_does_not_fit_is_one_cut_conversation(self) -> None:
        tokenizer = tiny_tokenizer(chat_template=THINKING_TEMPLATE, eos_token="<|im_end|>")
        turns = [USER, FOUR, {"role": "user", "content": "why? " * 50}, FOUR]
        made = prepare([{"messages": turns}], tokenizer=tokenizer, max_length=64)
        assert (len(made.dataset), made.truncated, made.skipped) == (1, 1, 0)


BAD = [
    ({"messages": [USER]}, "no assistant turn"),
    ({"messages": [FOUR, USER]}, "the conversation starts with an assistant turn"),
    ({"messages": [USER, {"role": "assistant", "content": " "}]}, "an empty assistant turn"),
    (
        {"messages": [{"role": "user", "content": "why? " * 50}, FOUR]},
        "the prompt alone reaches max_length=64",
    ),
    ({"messages": []}, "no assistant turn"),
    ({"messages": None}, "malformed messages"),
    ({"prompt": "two?", "completion": ""}, "an empty completion"),
    ({"prompt": "why? " * 50, "completion": "so"}, "the prompt alone reaches max_length=64"),
    ({"text": ""}, "an empty text"),
    ({"text": None}, "an empty text"),
]
GOOD = {
    "messages": {"messages": [USER, FOUR]},
    "prompt": {"prompt": "two?", "completion": "two"},
    "text": {"text": "two"},
}


class TestBadRows:
    @pytest.mark.parametrize(("bad", "reason"), BAD)
    def test_stops_at_the_row_with_one_line_that_names_the_way_out(self, bad: dict[str, Any], reason: str) -> None:
        with pytest.raises(ValueError, match=f"^row 1: {reason}; .*--skip_bad_rows true$") as error:
            prepare([GOOD[next(iter(bad))], bad], max_length=64)
        assert "\n" not in str(error.value)

    @pytest.mark.parametrize(("bad", "reason"), BAD)
    def test_is_dropped_and_counted_when_asked(self, bad: dict[str, Any], reason: str) -> None:
        good = GOOD[next(iter(bad))]
        made = prepare([bad, good, bad], max_length=64, skip_bad_rows=True)
        assert list(made.dataset) == list(prepare([good], max_length=64).dataset)
        assert made.skipped == 2 and made.reasons == {reason: 2}

    def test_nothing_left_is_an_error(self) -> None:
        with pytest.raises(ValueError, match=r"every row was skipped \(2 x an empty text\)"):
            prepare([{"text": ""}, {"text": ""}], skip_bad_rows=True)

    def test_found_by_a_worker_process_too(self) -> None:
        rows = [*words(40), {"text": ""}]
        with pytest.raises(ValueError, match="row 40: an empty text"):
            prepare(rows, num_proc=2)
        made = prepare(rows, num_proc=2, skip_bad_rows=True)
        assert list(made.dataset) == list(prepare(words(40)).dataset)


class TestColumns:
    def test_unknown_ones_are_named_beside_the_known(self) -> None:
        with pytest.raises(ValueError, match=r"columns answer, question: rename .*`messages`.*`text`.*`input_ids`"):
            prepare([{"question": "two?", "answer": "two"}])

    def test_messages_need_a_chat_template(self) -> None:
        for row in ({"messages": [USER, FOUR]}, {"prompt": [USER], "completion": [FOUR]}):
            with pytest.raises(ValueError, match="no chat template"):
                prepare([row], tokenizer=tiny_tokenizer(chat_template=None))

    def test_an_empty_dataset(self) -> None:
        with pytest.raises(ValueError, match="the dataset is empty"):
            prepare_dataset(Dataset.from_dict({"text": []}), tiny_tokenizer(), max_length=8)

    def test_a_packed_dataset(self) -> None:
        with pytest.raises(ValueError, match="packed already"):
            prepare_dataset(prepare(words(3), packing=True).dataset, tiny_tokenizer(), max_length=8)


class TestPacking:
    def test_every_sample_is_in_one_bin_and_whole(self) -> None:
        samples = {row["sample_id"]: row for row in prepare(words(50), max_length=64).dataset}
        packed = prepare(words(50), max_length=64, packing=True)
        seen = []
        for row in packed.dataset:
            assert len(row["input_ids"]) == len(row["labels"]) == sum(row["seq_lengths"]) <= 64
            for sample, end, length in zip(row["sample_id"], accumulate(row["seq_lengths"]), row["seq_lengths"], strict=True):
                assert row["input_ids"][end - length : end] == samples[sample]["input_ids"]
                assert row["labels"][end - length : end] == samples[sample]["labels"]
                seen.append(sample)
        assert sorted(seen) == sorted(samples)

    def test_bins_are_nearly_as_few_as_can_be(self) -> None:
        made = prepare(words(50), max_length=64, packing=True)
        total = sum(len(row["input_ids"]) for row in made.dataset)
        assert len(made.dataset) <= 1 + 11 / 9 * (total / 64)  # the bound of first- and best-fit decreasing

    def test_the_same_rows_give_the_same_bins(self) -> None:
        first, second = (prepare(words(50), max_length=64, packing=True).dataset for _ in range(2))
        assert list(first) == list(second)

    def test_skipped_rows_are_not_in_a_bin(self) -> None:
        made = prepare([*words(9), {"text": ""}], max_length=64, packing=True, skip_bad_rows=True)
        assert sum(len(row["sample_id"]) for row in made.dataset) == 9 and made.skipped == 1


def test_prepared_rows_on_disk_are_found_again_and_only_for_the_same_settings(tmp_path: Any) -> None:
    file = tmp_path / "rows.parquet"
    Dataset.from_list([{"messages": [USER, FOUR]}]).to_parquet(file)
    rows = Dataset.from_parquet(str(file), cache_dir=str(tmp_path))
    tokenizer = tiny_tokenizer(chat_template=CHATML_TEMPLATE)
    first, again = (prepare_dataset(rows, tokenizer, max_length=64).dataset for _ in range(2))
    assert first.cache_files == again.cache_files != []
    for other in (
        prepare_dataset(rows, tokenizer, max_length=32),
        prepare_dataset(rows, tiny_tokenizer(), max_length=64),
        prepare_dataset(rows, tokenizer, max_length=64, chat_template_kwargs={"enable_thinking": False}),
    ):
        assert other.dataset.cache_files != first.cache_files
