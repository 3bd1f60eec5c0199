"""What `--preview` shows."""

from __future__ import annotations

from datasets import Dataset
from rich.console import Console

from kdlib.data import prepare_dataset, preview_rows
from tests.tiny import CHATML_TEMPLATE, tiny_tokenizer

USER = {"role": "user", "content": "Is ☃ blue?"}
NO = {"role": "assistant", "content": "No ☃."}


def test_scored_spans_stand_in_brackets_and_in_green() -> None:
    tokenizer = tiny_tokenizer(chat_template=CHATML_TEMPLATE)
    prepared = prepare_dataset(Dataset.from_list([{"messages": [USER, NO]}]), tokenizer, max_length=99)
    row = prepared.dataset[0]
    shown = preview_rows(prepared.dataset, tokenizer, count=3)
    scored = sum(label != -100 for label in row["labels"])
    assert shown.plain == (
        f"row 0: {len(row['input_ids'])} tokens, {scored} scored\n"
        "<|im_start|>user↵\nIs ☃ blue?<|im_end|>↵\n<|im_start|>assistant↵\n⟦No ☃.<|im_end|>⟧↵\n\n\n"
    )
    green = [shown.plain[span.start : span.end] for span in shown.spans if "green" in str(span.style)]
    assert green == ["⟦No ☃.<|im_end|>⟧"]


def test_only_as_many_rows_as_asked_for() -> None:
    tokenizer = tiny_tokenizer()
    prepared = prepare_dataset(Dataset.from_list([{"text": f"text {i}"} for i in range(5)]), tokenizer, max_length=99)
    shown = preview_rows(prepared.dataset, tokenizer, count=2).plain
    assert "row 1:" in shown and "row 2:" not in shown


def test_packed_rows_are_shown_sample_by_sample() -> None:
    tokenizer = tiny_tokenizer()
    rows = Dataset.from_list([{"text": "two"}, {"text": "four apples"}])
    shown = preview_rows(prepare_dataset(rows, tokenizer, max_length=99, packing=True).dataset, tokenizer, count=1).plain
    assert "row 0, sample 1 of 2:" in shown and "row 0, sample 2 of 2:" in shown
    assert shown.count("<|eos|>⟧") == 2


def test_brackets_of_the_text_are_not_markup() -> None:
    tokenizer = tiny_tokenizer()
    prepared = prepare_dataset(Dataset.from_list([{"text": "a [bold]b[/bold]"}]), tokenizer, max_length=99)
    console = Console(width=200)
    with console.capture() as capture:
        console.print(preview_rows(prepared.dataset, tokenizer, count=1))
    assert "[bold]b[/bold]" in capture.get()
