"""Chat models with tokens of their own, and what alignment has to find, by trying all ranges of tokens."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from functools import cache
from typing import Any

from transformers import PreTrainedTokenizerFast

from kdlib.data.aligned import Aligned, Reader, TextRow
from kdlib.data.chat import ChatFormat, conversation_draft
from kdlib.data.draft import UNSCORED, TokenRow
from tests.tokenizers.families import family

_LOOP = "{% for m in messages %}"
_ASKS = "{% if add_generation_prompt %}"
# name: (template, its special tokens, the one that ends a turn)
TEMPLATES: dict[str, tuple[str, list[str], str]] = {
    "chatml": (
        _LOOP + "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
        "" + _ASKS + "{{ '<|im_start|>assistant\n' }}{% endif %}",
        ["<|im_start|>", "<|im_end|>"],
        "<|im_end|>",
    ),
    "llama3": (
        "{{ '<|begin|>' }}" + _LOOP + "{{ '<|header|>' + m.role + '<|end_header|>\n\n' + m.content | trim + '<|eot|>' }}"
        "{% endfor %}" + _ASKS + "{{ '<|header|>assistant<|end_header|>\n\n' }}{% endif %}",
        ["<|begin|>", "<|header|>", "<|end_header|>", "<|eot|>"],
        "<|eot|>",
    ),
    "mistral": (
        "{{ '<s>' }}" + _LOOP + "{% if m.role == 'user' %}{{ '[INST] ' + m.content + ' [/INST]' }}"
        "{% else %}{{ ' ' + m.content + '</s>' }}{% endif %}{% endfor %}",
        ["<s>", "</s>", "[INST]", "[/INST]"],
        "</s>",
    ),
    "gemma": (
        "{{ '<bos>' }}" + _LOOP + "{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\n' }}"
        "{{ m.content | trim + '<end_of_turn>\n' }}{% endfor %}" + _ASKS + "{{ '<start_of_turn>model\n' }}{% endif %}",
        ["<bos>", "<start_of_turn>", "<end_of_turn>"],
        "<end_of_turn>",
    ),
    # the last answer, and no earlier one, has a block of reasoning
    "qwen3": (
        _LOOP + "{{ '<|im_start|>' + m.role + '\n' }}"
        "{% if m.role == 'assistant' and loop.last %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
        "{{ m.content + '<|im_end|>\n' }}{% endfor %}" + _ASKS + "{{ '<|im_start|>assistant\n' }}{% endif %}",
        ["<|im_start|>", "<|im_end|>"],
        "<|im_end|>",
    ),
    # each answer has a channel; the last ends with another token than the earlier ones
    "gpt_oss": (
        _LOOP + "{{ '<|start|>' + m.role + ('<|channel|>final' if m.role == 'assistant' else '') + '<|message|>' + m.content }}"
        "{{ '<|return|>' if m.role == 'assistant' and loop.last else '<|end|>' }}{% endfor %}"
        "" + _ASKS + "{{ '<|start|>assistant' }}{% endif %}",
        ["<|start|>", "<|channel|>", "<|message|>", "<|end|>", "<|return|>"],
        "<|return|>",
    ),
    # no special tokens at all: a base model that is given a chat template
    "plain": (
        _LOOP + "{{ m.role + ': ' + m.content + '\n\n' }}{% endfor %}" + _ASKS + "{{ 'assistant:' }}{% endif %}",
        [],
        "",
    ),
    "unclosed": (
        _LOOP + "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
        "" + _ASKS + "{{ '<|im_start|>assistant\n' }}{% endif %}",
        [],
        "",
    ),
}


@cache
def speaker(name: str, template: str) -> Reader:
    """A family's tokenizer with a chat template and its special tokens."""
    tokenizer: PreTrainedTokenizerFast = deepcopy(family(name))
    tokenizer.chat_template, special, end = TEMPLATES[template]
    tokenizer.add_special_tokens({"additional_special_tokens": special})
    if end:
        tokenizer.eos_token = end
    tokenizer.pad_token = tokenizer.eos_token
    return Reader(tokenizer)


def conversation(*contents: str) -> list[dict[str, Any]]:
    """Questions and answers by turns."""
    return [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]


def rows_of(messages: Sequence[dict[str, Any]], reader: Reader) -> list[TokenRow]:
    """The token rows of a conversation."""
    draft = conversation_draft(messages, chat=ChatFormat(tokenizer=reader.tokenizer, template_kwargs={}, tools=None))
    return draft.build({text: reader.tokenizer.encode(text, add_special_tokens=False) for text in draft.texts})


def text_row(row: TokenRow, reader: Reader, *, length: int | None = None) -> TextRow:
    """A row, cut to ``length``."""
    return TextRow(input_ids=row.input_ids[:length], labels=row.labels[:length], reader=reader)


def turns_of(row: TextRow) -> list[list[int]]:
    """Positions of the scored tokens, turn by turn."""
    found: list[list[int]] = []
    for i, label in enumerate(row.labels):
        if label != UNSCORED and i > 0:
            if not found or found[-1][-1] != i - 1:
                found.append([])
            found[-1].append(i)
    return found


Expected = list[tuple[list[int], list[int]]]  # positions of each chunk's tokens on both sides


def all_ranges(row: TextRow, turn: Sequence[int], content: bytes) -> dict[tuple[int, int], list[int]]:
    """{(first byte, byte after the last) in ``content``: positions} of every range of a turn's tokens that lies in it."""
    pieces = [row.reader.text([row.input_ids[i]]) for i in turn]
    shown = content[: len(b"".join(pieces))] if len(b"".join(pieces)) < len(content) else content
    origin = next(at for at in range(len(b"".join(pieces)) + 1) if content.startswith(b"".join(pieces)[at : at + len(shown)]))
    ends = [sum(map(len, pieces[: n + 1])) - origin for n in range(len(pieces))]
    starts = [end - len(piece) for end, piece in zip(ends, pieces, strict=True)]
    return {
        (starts[i], ends[j]): list(turn[i : j + 1])
        for i in range(len(turn))
        for j in range(i, len(turn))
        if 0 <= starts[i] < ends[j] <= len(content)
    }


def brute_force(student: TextRow, teacher: TextRow, contents: Sequence[str]) -> Expected:
    """Of each answer, the least ranges of tokens that are the same bytes of it on both sides, then the tokens that end it."""
    found: Expected = []
    for turn, its_turn, content in zip(turns_of(student), turns_of(teacher), contents, strict=False):
        ours, theirs = (all_ranges(row, t, content.encode()) for row, t in ((student, turn), (teacher, its_turn)))
        same = ours.keys() & theirs.keys()
        least = [s for s in same if not any(o != s and s[0] <= o[0] and o[1] <= s[1] for o in same)]
        found += [(ours[span], theirs[span]) for span in sorted(least)]
        ends = [
            [i for i in t if row.input_ids[i] in row.reader.special and row.input_ids[i] == row.reader.tokenizer.eos_token_id]
            for row, t in ((student, turn), (teacher, its_turn))
        ]
        if all(ends):
            found.append((ends[0][-1:], ends[1][-1:]))
    return found


def chunks_of(found: Aligned) -> Expected:
    """What was found, as positions."""
    return [
        tuple([i for i, number in enumerate(side.tolist()) if number == chunk] for side in (found.student, found.teacher))
        for chunk in range(found.count)
    ]
