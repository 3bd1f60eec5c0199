"""Rows of a dataset -> prompts -> shards, and the completions that the rows bring themselves."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from tqdm.auto import tqdm
from transformers.utils.hub import cached_file, extract_commit_hash

from kdlib.data import load_rows, prompt_ids
from kdlib.data.chat import ChatFormat
from kdlib.data.draft import UNSCORED, BadRowError
from kdlib.data.kinds import draft_row
from kdlib.data.traces import Prompt, Prompts, read_prompts
from kdlib.data.traces.prompts import COLUMNS

if TYPE_CHECKING:
    from datasets import Dataset

    from kdlib.cli.generation.source import Source
    from kdlib.cli.trajectories import TrajectoriesArguments
    from kdlib.data.trajectories.table import RowWriter

OUTSIDE = "a token outside the model's vocabulary"


class TokenPrompts(Prompts):
    """The prompts of rows that are token ids: what stands before their last scored tokens."""

    def __getitem__(self, number: int) -> Prompt:
        row = self.rows[self._index[number]]
        return Prompt(prompt_id=self.prompt_ids[number], ids=self._ids[number].tolist(), asked="", row=row)


def prompts_of(a: TrajectoriesArguments, source: Source, *, answer: int = 1) -> Prompts:
    """The distinct prompts of the data set that leave room for ``answer`` tokens; ValueError when there are none."""
    rows = load_rows(a.dataset_name, split=a.dataset_train_split, config=a.dataset_config, limit=a.limit)
    room = None if source.context is None else source.context - answer
    longest = min((limit for limit in (a.max_prompt_length, room) if limit is not None), default=None)
    if {"input_ids", "labels"} <= set(rows.column_names) and not set(COLUMNS) & set(rows.column_names):
        return _token_prompts(rows, longest=longest)
    return read_prompts(
        rows,
        source.tokenizer,
        longest=longest,
        apply_chat_template=a.apply_chat_template,
        chat_template_kwargs=a.chat_template_kwargs,
    )


def _token_prompts(rows: Dataset, *, longest: int | None) -> Prompts:
    prompts = TokenPrompts(rows=rows, chat_wrapped=False)
    for index, row in enumerate(rows):
        prompts.add(index, row, ids=prompt_ids(row), longest=longest)
    if not len(prompts):
        raise ValueError(f"no row has a usable prompt ({dict(prompts.skipped)}): fix the rows, or the limit they break")
    return prompts


def own_completion(prompt: Prompt, chat: ChatFormat) -> list[int]:
    """The tokens of the row's own completion, its end included; none where it has none that follows the prompt's tokens.

    Rows of token ids bring them as they are (``labels``); ``completion`` or the last turn of ``messages`` is tokenised as
    for training.
    """
    row, start = prompt.row, len(prompt.ids)
    for ids, labels in [*_own_tokens(row), *_tokenised(prompt, chat)]:
        if list(ids[:start]) == prompt.ids:
            end = next((i for i in range(len(ids), start, -1) if labels[i - 1] != UNSCORED), start)
            return list(ids[start:end])
    return []


def _own_tokens(row: Any) -> list[tuple[list[int], list[int]]]:
    return [(row["input_ids"], row["labels"])] if row.get("input_ids") and row.get("labels") else []


def _tokenised(prompt: Prompt, chat: ChatFormat) -> list[tuple[list[int], list[int]]]:
    """(ids, labels) of the prompt and the text that answers it."""
    row, kind = dict(prompt.row), "pair"
    if row.get("prompt") and row.get("completion"):
        if isinstance(row["prompt"], str) and not isinstance(prompt.asked, str):  # it was put into a user turn
            row["completion"] = [{"role": "assistant", "content": row["completion"]}]
        row["prompt"] = prompt.asked
    elif row.get("messages"):
        kind = "messages"
    else:
        return []
    try:
        draft = draft_row(row, kind, chat, False)
        ids = chat.tokenizer(list(draft.texts), add_special_tokens=draft.special, verbose=False)["input_ids"]
        rows = draft.build(dict(zip(draft.texts, ids, strict=True)))
    except BadRowError:
        return []
    return [(made.input_ids, made.labels) for made in reversed(rows)]


def write_shards(
    prompts: Prompts,
    writer: RowWriter[Any],
    make: Callable[[Sequence[Prompt], Any], Any],
    *,
    shown: Callable[[Mapping[str, Any]], dict[str, str]],
) -> None:
    """Writes every missing shard: ``make`` gives what the writer takes from a shard's prompts, and advances the bar by rows,
    beside which stands what ``shown`` says of the index's summary. Whatever ``make`` raises, what is on disk stays good.
    """
    there = sum(shard.prompts for shard in writer.index.shards.values())
    with tqdm(total=len(prompts), initial=there, desc="Trajectories", unit="row", smoothing=0) as bar:
        for number in writer.missing:
            writer.write(number, make([prompts[i] for i in writer.prompts(number)], bar))
            bar.set_postfix(shown(writer.index.summary))


def revision(checkpoint: str) -> str | None:
    """The commit of a model on the Hub, None for a directory."""
    found: str | None = extract_commit_hash(cached_file(checkpoint, "config.json"), None)
    return found


def chat_format(a: TrajectoriesArguments, source: Source) -> ChatFormat:
    return ChatFormat(tokenizer=source.tokenizer, template_kwargs=a.chat_template_kwargs or {}, tools=None)
