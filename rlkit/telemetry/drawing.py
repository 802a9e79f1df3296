"""Style and primitives of the report's figures."""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil, floor, log10
from statistics import fmean
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullFormatter

from rlkit.telemetry.record import RunRecord

BLUE, ORANGE, GREEN, RED, PURPLE, GREY = ("#2563a8", "#d9822b", "#2e8b57", "#c23b3b", "#7a4fa3", "#a3a9b3")
LIGHT = "#d4d8de"
CYCLE = (BLUE, ORANGE, GREEN, PURPLE, RED, "#4aa3a2", "#8c6d46", "#5d6673")
STYLE: dict[Any, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#6b7280",
    "axes.labelcolor": "#374151",
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e8eaee",
    "grid.linewidth": 0.8,
    "xtick.color": "#4b5563",
    "ytick.color": "#4b5563",
    "legend.frameon": False,
    "legend.fontsize": 8,
    "lines.linewidth": 1.6,
    "text.parse_math": False,
    "svg.fonttype": "path",
    "svg.hashsalt": "rlkit",
}
BINS = 80


def smooth(values: Sequence[float]) -> tuple[list[float], int]:
    """Centred rolling mean over about a twentieth of the run, and its width (odd)."""
    half = len(values) // 40
    means = [fmean(values[max(0, i - half) : i + half + 1]) for i in range(len(values))]
    return means, 2 * half + 1


def binned(steps: Sequence[int], columns: Sequence[Sequence[float]]) -> tuple[list[float], float, list[list[float]]]:
    """Means over at most BINS stretches of steps: their centres, their width, one list a column."""
    width = max(1, -(-(steps[-1] - steps[0] + 1) // BINS))
    members: dict[int, list[int]] = {}
    for i, step in enumerate(steps):
        members.setdefault((step - steps[0]) // width, []).append(i)
    centres = [steps[0] + (number + 0.5) * width - 0.5 for number in members]
    means = [[fmean(column[i] for i in one) for one in members.values()] for column in columns]
    return centres, width, means


def new_figure(rows: int = 1, columns: int = 1, size: tuple[float, float] = (6.2, 3.0)) -> Figure:
    """A figure with its axes made; size in inches."""
    figure = Figure(figsize=size, layout="constrained")
    figure.subplots(rows, columns)
    return figure


def step_axis(axes: Axes, label: str = "learner step", ticks: int = 8) -> None:
    """Label the axis of steps, with whole numbers only."""
    axes.set_xlabel(label)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=ticks, steps=[1, 2, 5, 10], min_n_ticks=1))


def draw_line(axes: Axes, steps: Sequence[int], values: Sequence[float], label: str, c: str) -> None:
    """A metric: thin as logged, thick smoothed; a dot where there is one step only."""
    if len(steps) == 1:
        axes.plot(steps, values, "o", color=c, label=label)
        return
    means, width = smooth(values)
    if width > 1:
        axes.plot(steps, values, color=c, alpha=0.3, linewidth=0.8)
    axes.plot(steps, means, color=c, label=label)


def lines(
    run: RunRecord,
    names: Sequence[tuple[str, str]],
    title: str,
    unit: str,
    *,
    from_zero: bool = False,
    log: bool = False,
) -> Figure | None:
    """One axis with the metrics that were logged.

    Args:
        run: the run.
        names: (label, metric) of each line.
        title: over the figure.
        unit: of the vertical axis.
        from_zero: begin at 0, and reach 1 at least where all values are 0.
        log: logarithmic where all values are above 0.
    """
    found = [(label, *run.metric(name)) for label, name in names]
    found = [(label, steps, values) for label, steps, values in found if steps]
    if not found:
        return None
    figure = new_figure()
    axes = figure.axes[0]
    for (label, steps, values), colour in zip(found, CYCLE * len(found), strict=False):
        draw_line(axes, steps, values, label, colour)
    everything = [value for _, _, values in found for value in values]
    if log and min(everything) > 0:
        axes.set_yscale("log")
        axes.set_ylim(10 ** floor(log10(min(everything)) - 0.02), 10 ** ceil(log10(max(everything)) + 0.02))
        axes.yaxis.set_major_formatter("{x:g}")  # the default one needs text.parse_math
        axes.yaxis.set_minor_formatter(NullFormatter())
    elif from_zero:
        axes.set_ylim(0, max(everything) * 1.08 or 1.0)
    axes.set(title=title, ylabel=unit)
    step_axis(axes)
    if len(names) > 1:
        axes.legend()
    return figure
