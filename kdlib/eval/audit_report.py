"""An audit as a table on the terminal, a page and JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.table import Table

from kdlib.eval import page
from kdlib.eval.audit_statistics import NO, TAKEN_OVER, TEXT, Finding
from kdlib.eval.plots import bar_plot
from kdlib.eval.report_parts import interval_text, terminal_table

SHOWN, DRAWN = 20, 12
HEAD = ("behaviour", "what", "probes", "student over baseline", "teacher over baseline", "q", "verdict")
UNITS = {TEXT: "nats", "phrase": "share of answers", "answer": "share of answers"}
LEAD = (
    "How much likelier student and teacher make something than a clean baseline does, with 95% intervals over probes. q is "
    "Benjamini-Hochberg's, of the larger of both p-values: taken over is what both models do."
)


def audit_table(findings: Sequence[Finding]) -> Table:
    """The clearest findings first."""
    return terminal_table(HEAD, _rows(findings), title="audit", left=2, caption=_counted(findings))


def audit_page(path: Path, findings: Sequence[Finding], *, models: Mapping[str, str], settings: Mapping[str, Any]) -> Path:
    """Writes the page and returns its path."""
    taken = [one for one in findings if one.verdict == TAKEN_OVER]
    table = page.Table(header=HEAD, rows=_rows(findings), numeric=range(2, 6), caption=_counted(findings))
    options = [[key, str(value)] for key, value in {**models, **settings}.items()]
    figures: list[page.Block] = [
        page.Figure(title=kind, svg=bar_plot(_bars(findings, kinds), x=unit), caption="S: student, T: teacher.")
        for kind, unit, kinds in (("Texts", "nats", (TEXT,)), ("Answers", "share of answers", ("phrase", "answer")))
        if _bars(findings, kinds)
    ]
    return page.write_page(
        path,
        title="Audit",
        lead=LEAD,
        headline=page.Numbers(items=[("Taken over", str(len(taken)), f"of {len(findings)} tested")]),
        sections=[
            page.Section(title="Findings", blocks=[*figures, table] if findings else []),
            page.Section(title="Settings", blocks=[page.Table(header=["option", "value"], rows=options)]),
        ],
    )


def audit_json(findings: Sequence[Finding], *, models: Mapping[str, str], settings: Mapping[str, Any]) -> dict[str, Any]:
    """Everything that was tested, numbers as they are."""
    taken = sum(one.verdict == TAKEN_OVER for one in findings)
    return {"models": dict(models), "settings": dict(settings), "taken_over": taken, "findings": [asdict(f) for f in findings]}


def _rows(findings: Sequence[Finding]) -> list[list[str]]:
    shown = [one for one in findings if one.verdict != NO or one.kind == TEXT] or list(findings)
    return [
        [
            one.name if len(one.name) < 60 else f"{one.name[:57]}...",
            one.kind,
            str(one.probes),
            f"{interval_text(one.student.effect)} {UNITS[one.kind]}",
            f"{interval_text(one.teacher.effect)} {UNITS[one.kind]}",
            f"{one.q_value:.2g}",
            one.verdict,
        ]
        for one in shown[:SHOWN]
    ]


def _counted(findings: Sequence[Finding]) -> str:
    taken = sum(one.verdict == TAKEN_OVER for one in findings)
    return f"{taken} taken over, of {len(findings)} that were tested together"


def _bars(findings: Sequence[Finding], kinds: Sequence[str]) -> list[dict[str, Any]]:
    """Student and teacher of the clearest findings of some kinds, a bar each."""
    chosen = [one for one in findings if one.kind in kinds][: DRAWN // 2]
    return [
        {"label": f"{one.name[:30]} ({who})", **shift.effect.to_json()}
        for one in chosen
        for who, shift in (("S", one.student), ("T", one.teacher))
    ]
