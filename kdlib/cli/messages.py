"""What jsonargparse and transformers say about a wrong value, as one line that names the option."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any

from kdlib.cli.grammar import class_fields
from kdlib.cli.names import unknown

_KEY = re.compile(r'Parser key "([\w.]+)"')
_VALUE = re.compile(r"(?:Got|Given) value: (.*)")
_EXPECTED = re.compile(r"Expected an? (.*?)\. Got value|Subtypes: \[(.*)\]")
_ENUM = re.compile(r"(\S+) is not a valid \w+, please select one of \[(.*)\]")
_NOT_A_FIELD = re.compile(r"class_path '([\w.]+)'.*?Option '(\w+)' is not accepted", re.DOTALL)


def parse_error(message: str, known: Collection[str]) -> str:
    """jsonargparse's message as one line."""
    if match := re.search(r"unrecognized arguments: --([\w.]+)", message):
        return unknown(match[1].partition("=")[0], known)
    if match := _NOT_A_FIELD.search(message):
        return unknown(match[2], class_fields(match[1]), of=match[1].rpartition(".")[2])
    if match := re.search(r"arguments are required: ([\w, ]+)", message):
        names = match[1].split(", ")
        return f"{', '.join(names)} missing: add " + " and ".join(f"--{name} {name.upper()}" for name in names)
    if match := re.search(r"argument --([\w.]+): expected one argument", message):
        return f"--{match[1]} needs a value"
    keys, values, expected = _KEY.findall(message), _VALUE.findall(message), _EXPECTED.findall(message)
    if keys and values and expected:
        return f"{'.'.join(keys)}: expected {type_words(''.join(expected[-1]))}, not {values[-1]!r}"
    return one_line(message)


def value_error(message: str, config: Mapping[str, Any]) -> str:
    """transformers' message about a wrong choice, with the option it is about."""
    match = _ENUM.search(message)
    named = [] if match is None else [key for key, value in config.items() if value == match[1]]
    if match is None or not named:
        return message
    choices = match[2].replace("'", "")
    return f"{named[0]}: expected one of {choices}, not {match[1]!r}"


def type_words(text: str) -> str:
    """``<class 'int'>, <class 'NoneType'>`` -> ``int or null``."""
    text = re.sub(r"typing\.Literal\[(.*?)\]", lambda match: match[1].replace(", ", " or "), text)
    text = re.sub(r"<(?:class|enum) '(?:[\w.]*\.)?(\w+)'>", r"\1", text).replace("typing.", "")
    words = {"bool": "true or false", "NoneType": "null"}
    return " or ".join(words.get(part, part) for part in re.split(r", (?![^\[]*\])", text))


def one_line(message: str) -> str:
    """The message without its line breaks."""
    return " ".join(line.strip(" -") for line in message.splitlines() if line.strip(" -"))
