"""The prompts that acceptance is measured on, whatever form they come in, with the domain each belongs to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeAlias

from datasets import Dataset

from kdlib.data.draft import sample_id
from kdlib.data.traces.prompts import read_prompts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

DOMAINS = ("domain", "category")  # the first that a dataset has
Asked: TypeAlias = Any  # Dataset | Sequence[Mapping[str, Any]] | Sequence[str] | Sequence[Sequence[int]]


@dataclass(frozen=True, kw_only=True)
class PromptSet:
    """``ids``: tokens of each prompt, ``keys``: hashes of them, ``domains``: None where unknown.

    ``left_out``: rows that are not used, by reason.
    """

    ids: list[list[int]]
    domains: list[str | None]
    left_out: dict[str, int] = field(default_factory=dict)

    @property
    def keys(self) -> list[int]:
        return [sample_id(ids, []) for ids in self.ids]

    def __len__(self) -> int:
        return len(self.ids)


def prompt_set(
    prompts: Asked,
    *,
    tokenizer: PreTrainedTokenizerBase | None,
    longest: float,
    apply_chat_template: bool | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> PromptSet:
    """Token ids as they are; texts and rows as ``kdlib generate`` reads them.

    A row's ``domain`` or ``category`` is kept. Rows with more than ``longest`` tokens, without a prompt, or with a prompt that
    an earlier one has, are left out and counted. Raises ValueError for no prompts, for token ids that are too long, and for
    texts without a tokenizer.
    """
    if not len(prompts):
        raise ValueError("there are no prompts: give at least one")
    if not isinstance(prompts, Dataset) and not isinstance(prompts[0], str | Mapping):
        return _token_ids([list(ids) for ids in prompts], longest=longest)
    if tokenizer is None:
        raise ValueError("prompts as text need a tokenizer: add tokenizer=..., or give token ids")
    rows = prompts
    if not isinstance(prompts, Dataset):
        rows = Dataset.from_list([{"prompt": row} if isinstance(row, str) else dict(row) for row in prompts])
    found = read_prompts(
        rows,
        tokenizer,
        longest=None if longest == float("inf") else int(longest),
        apply_chat_template=apply_chat_template,
        chat_template_kwargs=chat_template_kwargs,
    )
    read = [found[number] for number in range(len(found))]
    duplicates = {"a prompt that an earlier row has": found.duplicates} if found.duplicates else {}
    return PromptSet(
        ids=[prompt.ids for prompt in read],
        domains=[_domain(prompt.row) for prompt in read],
        left_out={**found.skipped, **duplicates},
    )


def _token_ids(prompts: list[list[int]], *, longest: float) -> PromptSet:
    for index, ids in enumerate(prompts):
        if not ids:
            raise ValueError(f"prompt {index} is empty: give at least one token, for example the bos token")
        if len(ids) > longest:
            raise ValueError(
                f"prompt {index} has {len(ids)} tokens and leaves no room for max_new_tokens in the context "
                f"(at most {int(longest)}): shorten or drop it, or lower max_new_tokens"
            )
    return PromptSet(ids=prompts, domains=[None] * len(prompts))


def _domain(row: Mapping[str, Any]) -> str | None:
    return next((str(row[name]) for name in DOMAINS if row.get(name)), None)
