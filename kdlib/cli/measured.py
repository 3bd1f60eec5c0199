"""What a training command has measured of its own, as rows for the summary and the model card."""

from __future__ import annotations

import json
from typing import Any

from kdlib.cli.run_directory import RunDirectory
from kdlib.eval.acceptance_statistics import Estimate
from kdlib.eval.report_parts import interval_text


def measured_rows(directory: RunDirectory) -> list[list[str]]:
    """[what, value with interval, prompts] of a draft's acceptance and of parallel decoding, where they were measured."""
    found = {name: _read(directory, name) for name in ("acceptance", "jacobi", "diffusion")}
    return [*_acceptance(found["acceptance"]), *_jacobi(found["jacobi"]), *_diffusion(found["diffusion"])]


def _read(directory: RunDirectory, name: str) -> dict[str, Any]:
    path = directory.path / "eval" / f"{name}.json"
    found: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
    return found


def _acceptance(found: dict[str, Any]) -> list[list[str]]:
    return [
        [
            f"acceptance_length, {one['num_speculative_tokens']} speculative tokens, {one['draft_sample_method']} draft",
            interval_text(Estimate(**one["acceptance_length"])),
            str(found["prompts"]),
        ]
        for one in found.get("empirical", ())
    ]


def _diffusion(found: dict[str, Any]) -> list[list[str]]:
    names = {"base": "tokens per forward, before", "model": "tokens per forward"}
    return [
        [
            f"{names[one['model']]}, {next(iter(one['strategy']))}",
            interval_text(Estimate(**one["tokens_per_forward"])),
            str(one["answers"]),
        ]
        for one in found.get("points", ())
    ]


def _jacobi(found: dict[str, Any]) -> list[list[str]]:
    names = {"base": "tokens per forward, before", "trained": "tokens per forward"}
    return [
        [names[model], interval_text(Estimate(**one["tokens_per_forward"])), str(one["prompts"])]
        for model, one in found.items()
    ]
