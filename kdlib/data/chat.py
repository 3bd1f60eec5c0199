"""Conversations -> token rows, rendered by the tokenizer's chat template as the model will be served.

Every assistant turn is scored with its end-of-turn token; system, user and tool turns never are. A template
with ``{% generation %}`` markers says itself what is scored. For any other, the turn is what follows the
rendered prompt, and the whole conversation is one row as long as each prompt's tokens are a prefix of its
tokens. Templates that rewrite history (dropping earlier thinking) break that: then each assistant turn is a
row of its own, after the history it would be served with.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateError

from kdlib.data.draft import BadRowError, Draft, Encoded, TokenRow, common_prefix, scored_row
from kdlib.data.messages import Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_MARKER = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")


@dataclass(frozen=True, kw_only=True)
class ChatFormat:
    """How conversations become text: a tokenizer's template, the variables given to it, and the tools it may
    list.
    """

    tokenizer: PreTrainedTokenizerBase
    template_kwargs: Mapping[str, Any]
    tools: list[dict[str, Any]] | None

    @property
    def has_markers(self) -> bool:
        """Whether the template marks what the assistant writes."""
        return _MARKER.search(self.tokenizer.get_chat_template(tools=self.tools)) is not None

    def render(self, messages: Sequence[Message], *, generation_prompt: bool = False) -> str:
        """The text of ``messages``, with the opening of an assistant turn if ``generation_prompt``."""
        return self._apply(messages, add_generation_prompt=generation_prompt, tokenize=False)

    def marked(self, messages: Sequence[Message]) -> tuple[list[int], list[bool]]:
        """Token ids of ``messages`` and whether each lies between the template's generation markers."""
        encoded = self._apply(messages, return_dict=True, return_assistant_tokens_mask=True)
        ids, inside = encoded["input_ids"], [bool(flag) for flag in encoded["assistant_masks"]]
        # Markers often close before the end-of-turn token; a model that never sees it scored never stops.
        closes = [after and not here for after, here in zip([False, *inside], inside, strict=False)]
        eos = self.tokenizer.eos_token_id
        return ids, [here or (end and i == eos) for i, here, end in zip(ids, inside, closes, strict=True)]

    def ids(self, text: str) -> list[int]:
        """Token ids of a rendered text."""
        return self.tokenizer.encode(text, add_special_tokens=False)

    def turn_end(self, ids: Sequence[int]) -> int:
        """Where the last turn ends: after its end-of-turn token, before a template's whitespace behind it."""
        end = len(ids)
        while end > 0 and not str(self.tokenizer.decode([ids[end - 1]])).strip():
            end -= 1
        closed = end > 0 and ids[end - 1] in self.tokenizer.added_tokens_decoder
        return end if closed else len(ids)  # with no such token it is the whitespace that ends the turn

    def _apply(self, messages: Sequence[Message], **options: Any) -> Any:
        try:
            return self.tokenizer.apply_chat_template(
                list(messages),
                tools=self.tools,
                **options,
                **self.template_kwargs,
            )
        except (TemplateError, TypeError) as error:
            raise BadRowError("the chat template fails on this conversation", fix=f"it says: {error}") from error


@dataclass(frozen=True, kw_only=True)
class _Turn:
    """One assistant turn as text: what the model is prompted with, and that with the turn behind it."""

    prompt: str
    full: str


def conversation_draft(messages: Sequence[Message], *, chat: ChatFormat, context: int = 0) -> Draft:
    """The rows of one conversation; assistant turns among the first ``context`` messages are not scored."""
    turns = [i for i, message in enumerate(messages) if message["role"] == "assistant" and i >= context]
    if not turns:
        raise BadRowError(
            "no assistant turn", fix="nothing in the row could be scored, add the answer (or set on_policy_fraction 1)"
        )
    if any(messages[i].keys() == {"role", "content"} and not messages[i]["content"].strip() for i in turns):
        raise BadRowError("an empty assistant turn", fix="fill it in")
    for i in turns:
        _check_calls(messages, i, chat)
    if chat.has_markers:
        return Draft(texts=(), special=False, build=lambda _: _marked_rows(messages, turns, chat))
    if turns[0] == 0:
        raise BadRowError("the conversation starts with an assistant turn", fix="put a user turn before it")
    whole = chat.render(messages)
    texts = [
        _Turn(prompt=chat.render(messages[:i], generation_prompt=True), full=chat.render(messages[: i + 1])) for i in turns
    ]
    return Draft(
        texts=(whole, *(text for turn in texts for text in (turn.prompt, turn.full))),
        special=False,
        build=partial(_rendered_rows, whole, texts, chat),
    )


def _check_calls(messages: Sequence[Message], index: int, chat: ChatFormat) -> None:
    """Refuse a turn whose tool calls the template leaves out, as templates older than tools silently do."""
    names = [call.get("function", call)["name"] for call in messages[index].get("tool_calls", [])]
    if names:
        before = chat.render(messages[:index]) if index else ""
        after = chat.render(messages[: index + 1])
        if any(after.count(name) <= before.count(name) for name in names):
            raise BadRowError("the chat template drops tool calls", fix="use a template that renders them")


def _rendered_rows(whole: str, turns: Sequence[_Turn], chat: ChatFormat, encoded: Encoded) -> list[TokenRow]:
    """One row when every turn as served is a token prefix of the whole conversation, else one per turn."""
    ids = encoded[whole]
    spans = [(len(encoded[turn.prompt]), chat.turn_end(encoded[turn.full])) for turn in turns]
    if all(
        ids[:start] == encoded[turn.prompt] and ids[:end] == encoded[turn.full][:end]
        for turn, (start, end) in zip(turns, spans, strict=True)
    ):
        return [scored_row(ids, spans)]
    return [_served_row(turn, end, encoded) for turn, (_, end) in zip(turns, spans, strict=True)]


def _served_row(turn: _Turn, end: int, encoded: Encoded) -> TokenRow:
    """The turn after the history it is served with; a token that straddles prompt and turn is the turn's."""
    if not turn.full.startswith(turn.prompt):
        raise BadRowError(
            "the chat template's generation prompt is not how it renders an answered turn",
            fix="set chat_template_kwargs (such as enable_thinking) to match the data, or give `prompt` as "
            "messages and `completion` as the text that follows the generation prompt",
        )
    prompt, full = encoded[turn.prompt], encoded[turn.full]
    return scored_row(full, [(common_prefix(prompt, full), end)])


def _marked_rows(messages: Sequence[Message], turns: Sequence[int], chat: ChatFormat) -> list[TokenRow]:
    """Rows scored by the template's own markers; one per turn when the template rewrites earlier turns."""
    whole = chat.render(messages)
    followed = [i for i in turns if i + 1 < len(messages)]
    if all(whole.startswith(chat.render(messages[: i + 1]).rstrip()) for i in followed):
        return [_marked_row(messages, turns[0], chat)]
    return [_marked_row(messages[: i + 1], i, chat) for i in turns]


def _marked_row(messages: Sequence[Message], first: int, chat: ChatFormat) -> TokenRow:
    """One row of ``messages`` whose marked tokens are scored from message ``first`` on."""
    ids, marks = chat.marked(messages)
    answered = any(message["role"] == "assistant" for message in messages[:first])
    start = common_prefix(chat.ids(chat.render(messages[:first])), ids) if answered else 0
    return scored_row(ids, [(i, i + 1) for i in range(start, len(ids)) if marks[i]])
