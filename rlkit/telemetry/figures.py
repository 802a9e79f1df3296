"""The report's figures, kept as PNG and handed to the page as SVG; style and plain line figures are in report.yaml."""

import base64
import io
from collections.abc import Sequence
from itertools import cycle
from statistics import fmean

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from rlkit.telemetry.names import REPORT, check_name
from rlkit.telemetry.record import RunRecord

BLUE, *OTHERS = CYCLE = ("#2563a8", "#d9822b", "#2e8b57", "#7a4fa3", "#c23b3b", "#6b7280", "#b3a125")
STYLE = REPORT["style"]
LINES: dict[str, tuple[str, dict[str, str]]] = REPORT["lines"]
PANELS = ("learning_curve", "evaluations", "named_rewards", *LINES)


def smooth(values: Sequence[float]) -> tuple[list[float], int]:
    """Centred rolling mean over about a twentieth of the run, and its width (odd)."""
    half = len(values) // 40
    means = [fmean(values[max(0, i - half) : i + half + 1]) for i in range(len(values))]
    return means, 2 * half + 1


def new_figure(size: tuple[float, float], **texts: str) -> tuple[Figure, Axes]:
    """A figure (inches) with its axes, whose x counts steps."""
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(subplot_kw=texts)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6, steps=[1, 2, 5, 10], min_n_ticks=1))
    return figure, axes


def draw_line(axes: Axes, steps: Sequence[int], values: Sequence[float], label: str, colour: str) -> None:
    """A metric: thin as logged, thick smoothed; a dot where there is one step only."""
    means, width = smooth(values)
    if width > 1:
        axes.plot(steps, values, color=colour, alpha=0.3, linewidth=0.8)
    axes.plot(steps, means, color=colour, label=label, marker="o" if len(steps) == 1 else "")


def lines(run: RunRecord, title: str, names: dict[str, str]) -> Figure | None:
    """One axis with the metrics (label -> name) that were logged, from 0 up."""
    found = [(label, *run.metric(name)) for label, name in names.items() if run.metric(name)[0]]
    if not found:
        return None
    figure, axes = new_figure((4.4, 2.7), title=title, ylabel=check_name(next(iter(names.values()))).unit)
    for (label, steps, values), colour in zip(found, cycle(CYCLE), strict=False):
        draw_line(axes, steps, values, label, colour)
    axes.set_ylim(bottom=min(0.0, axes.get_ylim()[0]))
    if len(found) > 3:  # more would hide the curves
        figure.legend(loc="outside right upper")
    elif len(found) > 1:
        axes.legend()
    return figure


def learning_curve(run: RunRecord) -> Figure | None:
    """Training reward and held-out figures (whiskers: standard error) by learner step."""
    steps, rewards = run.metric("reward/mean")
    if not steps and not run.averages:
        return None
    figure, axes = new_figure((11.0, 3.9), ylabel="mean score", xlabel="learner step")
    if steps:
        width = smooth(rewards)[1]
        draw_line(axes, steps, rewards, "training" + (f", mean of {width} steps" if width > 1 else ""), BLUE)
    for curve, colour in zip(run.averages, cycle(OTHERS), strict=False):
        xs, ys, errors = zip(*((p.step, p.value, p.error or 0.0) for p in curve.points), strict=True)
        label = f"{curve.set} {curve.label}"
        axes.errorbar(xs, ys, yerr=errors, color=colour, marker="o", markersize=4, capsize=3, label=label)
    axes.set_ylim(bottom=min(0.0, axes.get_ylim()[0]))
    axes.legend()
    return figure


def draw_all(run: RunRecord) -> dict[str, tuple[str, str] | None]:
    """Draw plots/*.png, and remove those without data now; panel -> (caption, SVG as a data URI), None without."""
    folder = run.run_dir / "plots"
    folder.mkdir(exist_ok=True)
    scores = [c for c in run.evaluations if not c.label.startswith("logprob")] or run.evaluations
    held_out = {f"{c.set} {c.label}": f"eval/{c.set}/{c.label}" for c in scores}
    logged = {name for row in run.training for name in row.metrics}
    parts = {n.split("/")[1]: n for n in sorted(logged) if n.startswith("reward/") and n.count("/") == 2}
    plain = {"evaluations": ("Held-out figures", held_out), "named_rewards": ("Rewards by name", parts)} | LINES
    drawn: dict[str, tuple[str, str] | None] = dict.fromkeys(PANELS)
    with mpl.rc_context(STYLE):
        figures = {"learning_curve": learning_curve(run)} | {name: lines(run, *plain[name]) for name in plain}
        for name, figure in figures.items():
            if figure is None:
                (folder / f"{name}.png").unlink(missing_ok=True)
                continue
            figure.savefig(folder / f"{name}.png", dpi=150, metadata={"Software": None})
            buffer = io.BytesIO()
            figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
            first = next(iter(plain[name][1].values())) if name in plain else "reward/mean"
            data = base64.b64encode(buffer.getvalue()).decode()
            drawn[name] = check_name(first).meaning, f"data:image/svg+xml;base64,{data}"
    return drawn
