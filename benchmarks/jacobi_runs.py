"""Methods of consistency training, and runs of them that read equally many tokens."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from training import trained

ROOT = Path(__file__).resolve().parents[1]
BLOCK = 16
PROBE = 8  # steps after which the tokens of a method's step are known
PLAIN, ANCHORED = "CLLM, global", "CLLM, global, anchored to the model as it was"
METHODS: dict[str, dict[str, Any]] = {
    PLAIN: {},
    "CLLM, local": {"consistency": "local"},
    "Jacobi Forcing": {"schedule": "progressive", "context": "noisy"},
    ANCHORED: {"ar_labels": "teacher"},
    "cross-entropy alone": {"consistency_weight": 0.0},
    "CLLM, global, states of noise": {"state_source": "noise"},
    "CLLM, global, states renewed": {"state_source": "student"},
}


def trained_at_equal_tokens(
    runs: Path, methods: Sequence[str], *, common: Mapping[str, Any], steps: int, seed: int
) -> dict[str, Path]:
    """{method: the trained model}, each after as many tokens read as ``steps`` steps of PLAIN read."""
    fixed = {**common, "block_size": BLOCK, "logging_steps": 1, "save_strategy": "no", "evaluate.limit": 0}
    options = {name: {**fixed, **METHODS[name]} for name in dict.fromkeys([PLAIN, *methods])}
    for of in options.values():
        of |= {"teacher": of["model"]} if of.get("ar_labels") == "teacher" else {}
    few = min(steps, PROBE)
    probes = {
        name: trained("jacobi", runs / f"probe-{slug(name)}", **of, seed=0, max_steps=few) for name, of in options.items()
    }
    read = {name: seen_tokens(final) for name, final in probes.items()}
    each = {name: max(1, round(steps * read[PLAIN] / read[name])) for name in methods}
    return {
        name: trained("jacobi", runs / f"{seed}-{slug(name)}", **options[name], seed=seed, max_steps=each[name])
        for name in methods
    }


def slug(name: str) -> str:
    return "".join(c if c.isalnum() else "-" for c in name)


def seen_tokens(final: Path) -> int:
    """Tokens of text and states that the run has read."""
    lines = (final.parent / "metrics.jsonl").read_text().splitlines()
    return int(max(json.loads(line).get("seen_tokens", 0) for line in lines))


def write_trajectories(rows: Path, output: Path, *, model: str | Path, limit: int, longest: int) -> dict[str, Any]:
    """The model's greedy answers to the first prompts with their states; returns what index.json says of them."""
    words = ["--model", str(model), "--dataset_name", str(rows), "--limit", str(limit), "--block_size", str(BLOCK)]
    words += ["--max_completion_length", str(longest), "--device", "cpu", "--output_dir", str(output)]
    call = [sys.executable, "-m", "kdlib", "trajectories", "jacobi", *words]
    subprocess.run(call, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    summary: dict[str, Any] = json.loads((output / "index.json").read_text())["summary"]
    return summary
