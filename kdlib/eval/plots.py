"""Plots as inline SVG, drawn by matplotlib, whose colours follow the page in light and dark."""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import matplotlib
from markupsafe import Markup
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

# Stand-ins for the page's CSS variables, put into the SVG afterwards: one plot for both colour schemes.
INK, MUTED, RULE = "#010101", "#020202", "#030303"
SERIES = ("#040401", "#040402", "#040403", "#040404", "#040405")
_VARIABLES = {INK: "--ink", MUTED: "--muted", RULE: "--rule"} | {c: f"--series-{i + 1}" for i, c in enumerate(SERIES)}
_STYLE: dict[Any, Any] = {
    "text.parse_math": False,  # a dollar sign is a dollar sign
    "svg.fonttype": "none",  # text stays text, set in the page's font
    "svg.hashsalt": "kdlib",  # the same plot gives the same bytes
    "font.size": 9.5,
    "text.color": INK,
    "axes.labelcolor": MUTED,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "axes.edgecolor": RULE,
    "axes.linewidth": 0.8,
    "grid.color": RULE,
    "grid.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.formatter.useoffset": False,
    "xtick.major.size": 0.0,
    "ytick.major.size": 0.0,
    "legend.frameon": False,
    "lines.linewidth": 1.7,
    "lines.solid_capstyle": "round",
    "axes.axisbelow": True,
}
Points = tuple[Sequence[float], Sequence[float]]


def line_plot(
    series: Mapping[str, Points],
    *,
    x: str = "optimizer step",
    y: str,
    order: Sequence[str] = (),
    from_zero: bool = False,
) -> Markup:
    """Curves over a common axis; ``series`` maps a name to its (x, y) values, few points are marked by dots.

    A name in ``order`` takes the colour of its place there, so that a model looks the same in every plot.
    """
    with matplotlib.rc_context(_STYLE):
        figure, axes = _axes(width=5.4, height=3.0, x=x, y=y)
        handles: list[Artist] = []
        for index, (name, (xs, ys)) in enumerate(series.items()):
            colour, marker = _colour(name, index, order), "o" if len(xs) < 12 else ""
            handles += axes.plot(xs, ys, color=colour, marker=marker, markersize=3.5)
        if from_zero:
            axes.set_ylim(bottom=0)
        _name(axes, handles, series)
        return _svg(figure, label=f"{y} over {x}: {', '.join(series)}")


def stacked_plot(series: Mapping[str, Points], *, x: str = "optimizer step", y: str) -> Markup:
    """Shares of a whole over a common axis; all series share the x values of the first."""
    with matplotlib.rc_context(_STYLE):
        figure, axes = _axes(width=5.4, height=3.0, x=x, y=y)
        steps = next(iter(series.values()))[0]
        heights = [ys for _, ys in series.values()]
        handles = axes.stackplot(steps, *heights, colors=SERIES[: len(series)], alpha=0.75, linewidth=0)
        axes.set_ylim(bottom=0)
        _name(axes, handles, series)
        return _svg(figure, label=f"{y} over {x}: {', '.join(series)}")


def bar_plot(rows: Sequence[Mapping[str, Any]], *, x: str, order: Sequence[str] = ()) -> Markup:
    """Horizontal bars with intervals; each row has ``label value low high``, the bounds None when unknown.

    ``order`` gives colours as in ``line_plot``; bars outside it share one.
    """
    with matplotlib.rc_context(_STYLE):
        figure, axes = _axes(width=5.4, height=0.75 + 0.36 * len(rows), x=x, y="")
        for index, row in enumerate(rows):
            axes.barh(index, row["value"], height=0.56, color=_colour(row["label"], 0, order), alpha=0.85)
            if row["low"] is not None:
                low, high = max(row["value"] - row["low"], 0.0), max(row["high"] - row["value"], 0.0)
                axes.errorbar(row["value"], index, xerr=[[low], [high]], color=INK, elinewidth=1.1, capsize=3.0)
        axes.set_yticks(range(len(rows)), [row["label"] for row in rows])
        axes.invert_yaxis()
        axes.set_xlim(left=min(0.0, *(row["value"] for row in rows)))
        axes.grid(False, axis="y")
        axes.grid(True, axis="x")
        values = ", ".join(f"{row['label']} {row['value']:.3g}" for row in rows)
        return _svg(figure, label=f"{x}: {values}")


def _colour(name: str, index: int, order: Sequence[str]) -> str:
    return SERIES[(order.index(name) if name in order else index) % len(SERIES)]


def _axes(*, width: float, height: float, x: str, y: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), layout="constrained")
    figure.patch.set_alpha(0.0)
    axes = figure.add_subplot()
    axes.patch.set_alpha(0.0)
    axes.grid(True, axis="y")
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=x == "optimizer step"))
    return figure, axes


def _name(axes: Axes, handles: Sequence[Artist], names: Iterable[str]) -> None:
    """A legend above the plot, left-aligned; one series needs none."""
    if len(handles) > 1:
        axes.legend(
            handles,
            list(names),
            loc="lower left",
            bbox_to_anchor=(0.0, 1.0),
            ncols=4,
            borderaxespad=0.2,
            borderpad=0.2,
            handlelength=1.3,
            columnspacing=1.4,
        )


def _svg(figure: Figure, *, label: str) -> Markup:
    """The figure as an <svg> element of the page: no metadata, no size, colours as CSS variables."""
    buffer = io.StringIO()
    FigureCanvasSVG(figure).print_svg(buffer, metadata={"Creator": None, "Date": None, "Format": None, "Type": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    opening, rest = svg.split(">", 1)
    box = re.search(r'viewBox="[^"]+"', opening)
    assert box is not None
    for colour, variable in _VARIABLES.items():
        rest = rest.replace(colour, f"var({variable})")
    return Markup('<svg {} role="img" aria-label="{}">').format(Markup(box.group()), label) + Markup(rest)
