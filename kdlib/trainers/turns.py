"""Before the first step: do student and teacher end their turns with the same token, and open them in the same mode?"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedTokenizerBase

from kdlib.data.chat import ChatFormat
from kdlib.models import eos_ids

logger = logging.getLogger("kdlib.rollouts")

_ASKED = [{"role": "user", "content": "Hello"}]
_ANSWERED = [*_ASKED, {"role": "assistant", "content": "Hello"}]


def stop_ids(
    given: int | list[int] | None, tokenizer: PreTrainedTokenizerBase, template_kwargs: Mapping[str, Any]
) -> tuple[int, ...]:
    """The tokens that end a completion: ``given`` (a generation config's eos), the tokenizer's eos, the template's end of turn.

    Raises ValueError when there is none, because every completion would run to the limit.
    """
    found = [*eos_ids(given), tokenizer.eos_token_id, end_of_turn(tokenizer, template_kwargs)]
    ids = tuple(sorted({i for i in found if i is not None}))
    if not ids:
        raise ValueError("the model has no token that ends a turn: set eos_token_id in its generation_config.json")
    return ids


def end_of_turn(tokenizer: PreTrainedTokenizerBase, template_kwargs: Mapping[str, Any]) -> int | None:
    """The special token with which the chat template closes an assistant turn; None without a template or such a token."""
    if tokenizer.chat_template is None:
        return None
    chat = ChatFormat(tokenizer=tokenizer, template_kwargs=template_kwargs, tools=None)
    ids = chat.ids(chat.render(_ANSWERED))
    last = ids[chat.turn_end(ids) - 1]
    known = last in tokenizer.added_tokens_decoder and last != tokenizer.unk_token_id
    return last if known else None


def compare(
    student: PreTrainedTokenizerBase,
    teacher: PreTrainedTokenizerBase,
    template_kwargs: Mapping[str, Any],
) -> list[str]:
    """One line for each way in which the teacher would not recognise the student's turns."""
    found = []
    ours, theirs = (end_of_turn(tokenizer, template_kwargs) for tokenizer in (student, teacher))
    if theirs is not None and ours != theirs:
        names = [repr(None if i is None else student.convert_ids_to_tokens(i)) for i in (ours, theirs)]
        found.append(
            f"the student ends its turns with {names[0]} and the teacher with {names[1]}: give the student the teacher's chat "
            "template, and train it on rows rendered with that first (on_policy_fraction 0), or its rollouts will not end"
        )
    if student.chat_template is not None and teacher.chat_template is not None:
        prompts = [_opening(tokenizer, template_kwargs) for tokenizer in (student, teacher)]
        if ("<think>" in prompts[0]) != ("<think>" in prompts[1]):
            found.append(
                f"student and teacher open a turn in different thinking modes ({prompts[0]!r} and {prompts[1]!r}): set "
                "chat_template_kwargs, such as enable_thinking, so that both agree"
            )
    return found


def _opening(tokenizer: PreTrainedTokenizerBase, template_kwargs: Mapping[str, Any]) -> str:
    """What the template puts between the question and the answer."""
    chat = ChatFormat(tokenizer=tokenizer, template_kwargs=template_kwargs, tools=None)
    return chat.render(_ASKED, generation_prompt=True).removeprefix(chat.render(_ASKED))


def warn(lines: list[str]) -> None:
    for line in lines:
        logger.warning("%s", line)
