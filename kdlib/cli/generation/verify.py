"""The verifier that ``--verify`` names."""

from __future__ import annotations

from collections.abc import Collection
from contextlib import ExitStack
from pathlib import Path

import xxhash

from kdlib.cli.grammar import load_user_module
from kdlib.verifiers import ExactNumber, MathVerify, UserCallable, Verifier

NAMES = ("exact_number", "math-verify")


def load_verifier(name: str | None, *, answer_column: str, columns: Collection[str], stack: ExitStack) -> Verifier | None:
    """None for no name; ValueError with one line for an unknown one, or when the rows have no answers."""
    if name is None:
        return None
    if ":" in name:
        return _own(name)
    if name.replace("-", "_") not in ("exact_number", "math_verify"):
        raise ValueError(f"no verifier {name}: choose {', '.join(NAMES)}, or file.py:function of your own")
    if answer_column not in columns:
        raise ValueError(
            f"--verify {name} compares with the column {answer_column}, and the rows have {', '.join(sorted(columns))}: "
            "name theirs with --answer_column"
        )
    if name == "exact_number":
        return ExactNumber(column=answer_column)
    verifier = MathVerify(column=answer_column)
    stack.callback(verifier.close)
    return verifier


def verifier_fingerprint(name: str | None) -> str | None:
    """Of the user's file, so that verdicts of two versions of it are not mixed; None for a verifier of ours or a module."""
    source = (name or "").rpartition(":")[0]
    return xxhash.xxh64_hexdigest(Path(source).read_bytes()) if source.endswith(".py") else None


def _own(name: str) -> UserCallable:
    source, _, attribute = name.rpartition(":")
    found = vars(load_user_module(source)).get(attribute)
    if not callable(found):
        raise ValueError(f"{source} has no function {attribute}: it takes (completion, row) and returns True, False or None")
    return UserCallable(function=found)
