"""The golden metric beside the training loss, as a section of a run's report and a line of its summary."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from kdlib.eval.page import Figure, Notes, Section
from kdlib.eval.plots import line_plot
from kdlib.eval.report import series

Metrics = Sequence[Mapping[str, Any]]
LEAD = (
    "The proxy is what is trained on, the golden metric what it is meant for. A healthy run goes down and to the left; one "
    "that fits the teacher's faults turns upwards while the proxy still falls (Tiapkin et al. 2025)."
)


def golden_section(metrics: Metrics) -> Section:
    """Both metrics over steps, one against the other, and what the alarm said; empty for a run without golden text."""
    golden, loss = series(metrics, "golden/value"), series(metrics, "loss")
    if not golden[0]:
        return Section(title="Teacher hacking", blocks=[])
    proxy = {"proxy": loss, "proxy, evaluation rows": series(metrics, "eval_loss")}
    path = _path(metrics)
    return Section(
        title="Teacher hacking",
        lead=LEAD,
        blocks=[
            Notes(items=[golden_line(metrics)]),
            Figure(title="Golden metric", svg=line_plot({"golden": golden}, y="nats per unit of golden text")),
            Figure(title="Proxy", svg=line_plot({name: points for name, points in proxy.items() if points[0]}, y="loss")),
            Figure(
                title="Golden metric against proxy",
                svg=line_plot({"evaluations": path}, x="proxy: mean training loss since the evaluation before", y="golden"),
                caption=f"From step {golden[0][0]:,.0f} to step {golden[0][-1]:,.0f}; training goes from right to left.",
            ),
        ],
    )


def golden_line(metrics: Metrics) -> str:
    """The alarm, or that there was none."""
    steps, values = series(metrics, "golden/value")
    alarms = [step for step, value in zip(*series(metrics, "golden/alarm"), strict=True) if value]
    best = min(range(len(values)), key=values.__getitem__)
    said = f"alarm at step {alarms[0]:,.0f}" if alarms else "no alarm"
    return f"{said}; golden metric {values[-1]:.4f} at the end, best {values[best]:.4f} at step {steps[best]:,.0f}"


def _path(metrics: Metrics) -> tuple[list[float], list[float]]:
    """(mean loss since the look before, golden metric) of every look that has losses."""
    losses = list(zip(*series(metrics, "loss"), strict=True))
    found, before = [], 0.0
    for step, value in zip(*series(metrics, "golden/value"), strict=True):
        since = [loss for at, loss in losses if before < at <= step]
        if since:
            found.append((sum(since) / len(since), value))
        before = step
    return [x for x, _ in found], [y for _, y in found]
