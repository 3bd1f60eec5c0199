"""Which part of a completion is the answer, when the model thinks first."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

KNOWN_ENDS = ("</think>", "[/THINK]")
AUTO = "auto"


@dataclass(frozen=True, kw_only=True)
class Thinking:
    """``end`` is the text that ends a model's thinking; ``start``, which begins it, is the end without its slash.

    An end without a slash has no known start: then every completion is taken to begin with thinking.
    """

    end: str
    tokenizer: PreTrainedTokenizerBase

    @property
    def start(self) -> str | None:
        start = self.end.replace("/", "", 1)
        return None if start == self.end else start

    def answer(self, prompt: Sequence[int], completion: Sequence[int]) -> str | None:
        """The text behind the last end of thinking, all of it where nothing was thought; None for thinking that never ends.

        Thinking may begin in the prompt: some chat templates open it for the model.
        """
        written = self.tokenizer.decode(completion, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        _, closed, rest = written.rpartition(self.end)
        if self._open(prompt, rest, closed=bool(closed)):
            return None
        if closed:
            return self._without_special(rest)
        return self.tokenizer.decode(completion, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def _open(self, prompt: Sequence[int], rest: str, *, closed: bool) -> bool:
        """Whether the completion ends in the middle of its thinking; ``rest``: what it wrote after the last end."""
        if self.start is None:
            return not closed
        if closed or self.start in rest:
            return self.start in rest
        return self.tokenizer.decode(prompt[-8:], skip_special_tokens=False).rstrip().endswith(self.start)

    def _without_special(self, text: str) -> str:
        for token in self.tokenizer.all_special_tokens:
            text = text.replace(token, "")
        return text


def thinking_of(end: str | None, tokenizer: PreTrainedTokenizerBase) -> Thinking | None:
    """``auto``: the tokenizer's own token that ends thinking, where it has one; None: completions are answers."""
    if end == AUTO:
        vocabulary = tokenizer.get_vocab()
        end = next((known for known in KNOWN_ENDS if known in vocabulary), None)
    return None if end is None else Thinking(end=end, tokenizer=tokenizer)
