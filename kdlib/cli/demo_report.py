"""Scores of the demo's three models, as a table and a page."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rich.table import Table

from kdlib.eval import comparison_report, evaluate, results_table
from kdlib.models import load_model, parameter_count

MODELS = {"teacher": "teacher", "student, fine-tuned": "finetuned", "student, distilled": "distilled"}
LEAD = (
    "Two equal students saw the same rows in the same order; one calculation in four is wrong in them, as in text that people "
    "write. One student was trained on their tokens alone, the other on the teacher's distribution over every next token. All "
    "three models were scored by lm-eval on problems that none has seen, against the right answers."
)
SCORED, SAMPLES = 250, 6


def demo_report(root: Path, *, task: str, seed: int) -> tuple[Table, Path]:
    """Scores what has no score yet, and writes report.html; the table has the three models side by side."""
    results = {name: _scored(root, folder, task) for name, folder in MODELS.items()}
    page = comparison_report(
        root / "report.html",
        title="kdlib demo",
        lead=LEAD,
        models=[
            {
                "name": name,
                "results": found,
                "details": {"parameters": f"{parameter_count(load_model(str(root / MODELS[name] / 'final'))):,}"},
            }
            for name, found in results.items()
        ],
        curves=_curves(root),
        samples=_samples(results, task),
        notes=[f"seed {seed}; intervals are 95%, over problems", *_settings(root)],
    )
    return results_table(results, title="accuracy on problems that none has seen"), page


def _scored(root: Path, folder: str, task: str) -> dict[str, Any]:
    target = root / folder / "eval" / "final.json"
    if not target.is_file():
        evaluate(
            str(root / folder / "final"),
            task,
            include_path=str(root / "tasks"),
            batch_size=SCORED,
            device="cpu",
            log_samples=True,
            output_path=target,
        )
    return json.loads(target.read_text())


def _curves(root: Path) -> dict[str, dict[str, tuple[list[int], list[float]]]]:
    """Training loss of the students; the teacher's is cross-entropy on other rows."""
    curves: dict[str, dict[str, tuple[list[int], list[float]]]] = {
        "cross-entropy (nats per token)": {},
        "KL to the teacher (nats per token)": {},
    }
    for axis, name, key in (
        ("cross-entropy (nats per token)", "teacher", "loss"),
        ("cross-entropy (nats per token)", "student, fine-tuned", "loss"),
        ("KL to the teacher (nats per token)", "student, distilled", "kl_forward"),
    ):
        lines = [json.loads(line) for line in (root / MODELS[name] / "metrics.jsonl").read_text().splitlines()]
        logged = [line for line in lines if "grad_norm" in line and key in line]
        curves[axis][name] = ([line["step"] for line in logged], [line[key] for line in logged])
    return curves


def _samples(results: dict[str, dict[str, Any]], task: str) -> list[Any]:
    """Some problems with each model's answer, those first on which the students disagree."""
    logged = {name: {line["doc_id"]: line for line in found["samples"][task]} for name, found in results.items()}
    fine, distilled = (logged[name] for name in list(MODELS)[1:])
    order = sorted(fine, key=lambda i: (fine[i]["exact_match"] == distilled[i]["exact_match"], i))
    return [
        {
            "prompt": fine[i]["doc"]["question"],
            "reference": fine[i]["doc"]["messages"][1]["content"],
            "answers": {
                name: (lines[i]["resps"][0][0].strip(), bool(lines[i]["exact_match"])) for name, lines in logged.items()
            },
        }
        for i in order[:SAMPLES]
    ]


def _settings(root: Path) -> list[str]:
    plans = {name: json.loads((root / folder / "plan.json").read_text()) for name, folder in MODELS.items()}
    return [f"{name}: {plan['rows']:,} rows, {plan['optimizer_steps']:,} steps" for name, plan in plans.items()]
