"""Messages of a row, freed from what tables and servers do to them."""

from __future__ import annotations

import json
from typing import Any

from kdlib.data.draft import BadRowError

Message = dict[str, Any]


def chat_messages(value: object) -> list[Message]:
    """Messages as templates expect them: text content, tool arguments as objects, no nulls from the table."""
    if not isinstance(value, list) or any(not isinstance(m, dict) or "role" not in m for m in value):
        raise BadRowError("malformed messages", fix='give a list of {"role": ..., "content": ...}')
    return [_message(message) for message in value]


def _message(raw: Message) -> Message:
    message = without_nulls(raw)
    content = message.get("content")
    if isinstance(content, list):
        content = _joined_parts(content)
    if not isinstance(content, str | None):
        raise BadRowError("a turn whose content is not text", fix="give a string")
    if content is None and raw["role"] != "assistant":
        raise BadRowError(f"a {raw['role']} turn without content", fix="fill it in")
    message["content"] = content or ""  # beside tool calls it may be null, which many templates cannot take
    for call in message.get("tool_calls", []):
        function = call.get("function", call)
        if "name" not in function:
            raise BadRowError("a tool call without a name", fix='give {"function": {"name": ..., "arguments": ...}}')
        if isinstance(function.get("arguments"), str):  # servers pass templates the object, not its JSON text
            function["arguments"] = parsed_json(function["arguments"], what="tool call arguments")
    return message


def _joined_parts(parts: list[Any]) -> str:
    if not all(isinstance(part, dict) and part.get("type") == "text" for part in parts):
        raise BadRowError("a turn with other content than text", fix="only text can be trained on")
    return "\n".join(part["text"] for part in parts)


def without_nulls(value: Any) -> Any:
    """``value`` without keys that hold None: Arrow gives every object of a column the union of their keys."""
    if isinstance(value, dict):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [without_nulls(item) for item in value]
    return value


def parsed_json(text: str, *, what: str) -> Any:
    """The value of a JSON text found in a row."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise BadRowError(f"{what} that are not JSON", fix=f"{error}") from error
