"""The report's figures, kept as PNG and handed to the page as SVG; style and plain line figures are in report.yaml."""

import base64
import io
from collections.abc import Sequence
from statistics import fmean

import matplotlib as mpl
import yaml
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from rlkit.telemetry.names import check_name, read_resource
from rlkit.telemetry.record import RunRecord

BLUE, *OTHERS = CYCLE = ("#2563a8", "#d9822b", "#2e8b57", "#7a4fa3", "#c23b3b", "#6b7280", "#b3a125")


def smooth(values: Sequence[float]) -> tuple[list[float], int]:
    """Centred rolling mean over about a twentieth of the run, and its width (odd)."""
    half = len(values) // 40
    means = [fmean(values[max(0, i - half) : i + half + 1]) for i in range(len(values))]
    return means, 2 * half + 1


def new_figure(columns: int = 1, size: tuple[float, float] = (4.4, 2.7)) -> tuple[Figure, list[Axes]]:
    """A figure (inches) with its axes, whose x counts steps."""
    figure = Figure(figsize=size, layout="constrained")
    figure.subplots(1, columns)
    for axes in figure.axes:
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6, steps=[1, 2, 5, 10], min_n_ticks=1))
    return figure, figure.axes


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
    figure, (axes,) = new_figure()
    for i, (label, steps, values) in enumerate(found):
        draw_line(axes, steps, values, label, CYCLE[i % len(CYCLE)])
    axes.set(title=title, ylabel=check_name(next(iter(names.values()))).unit)
    axes.set_ylim(bottom=min(0.0, axes.get_ylim()[0]))
    if len(found) > 3:  # more would hide the curves
        figure.legend(loc="outside right upper")
    elif len(found) > 1:
        axes.legend()
    return figure


def learning_curve(run: RunRecord) -> Figure | None:
    """Held-out before and after on the left; training reward and held-out by step on the right."""
    steps, rewards = run.metric("reward/mean")
    if not steps and not run.averages:
        return None
    figure, axes = new_figure(2 if run.averages else 1, (11.0, 3.9))
    if run.averages:
        _before_after(axes[0], run)
    curve = axes[-1]
    if steps:
        width = smooth(rewards)[1]
        draw_line(curve, steps, rewards, "training" + (f", mean of {width} steps" if width > 1 else ""), BLUE)
    for i, average in enumerate(run.averages):
        xs, ys, errors = zip(*((p.step, p.value, p.error or 0.0) for p in average.points), strict=True)
        label, colour = f"{average.set} {average.label}", OTHERS[i % len(OTHERS)]
        curve.errorbar(xs, ys, yerr=errors, color=colour, marker="o", markersize=4, capsize=3, label=label)
    curve.set(title="By learner step", ylabel="mean score", xlabel="learner step")
    curve.set_ylim(bottom=min(0.0, curve.get_ylim()[0]))
    curve.legend()
    return figure


def _before_after(axes: Axes, run: RunRecord) -> None:
    for offset, colour, name in ((-0.18, "#a3a9b3", "before"), (0.18, BLUE, "after")):
        points = [(i + offset, getattr(curve, name)) for i, curve in enumerate(run.averages)]
        shown = [(x, point.value, point.error or 0.0) for x, point in points if point is not None]
        if shown:
            xs, heights, errors = zip(*shown, strict=True)
            bars = axes.bar(xs, heights, 0.34, yerr=errors, color=colour, label=name, capsize=4)
            axes.bar_label(bars, fmt="%.3f", padding=3, fontweight="bold")
    axes.set_xticks(range(len(run.averages)), [f"{curve.set}\n{curve.label}" for curve in run.averages])
    axes.set_xlim(-0.6, len(run.averages) - 0.4)
    axes.margins(y=0.15)
    axes.grid(visible=False, axis="x")
    axes.set(title="Held-out, before and after (whiskers: standard error)", ylabel="mean score")
    axes.legend(loc="upper left", ncols=2)


_TEXTS = yaml.safe_load(read_resource("report.yaml"))
STYLE = _TEXTS["style"]
LINES: dict[str, tuple[str, dict[str, str]]] = _TEXTS["lines"]
PANELS = ("learning_curve", "evaluations", "named_rewards", *LINES)


def draw_all(run: RunRecord) -> dict[str, tuple[str, str] | None]:
    """Draw plots/*.png, and remove those without data now; panel -> (caption, SVG as a data URI), None without."""
    folder = run.run_dir / "plots"
    folder.mkdir(exist_ok=True)
    held_out = {f"{c.set} {c.label}": f"eval/{c.set}/{c.label}" for c in run.evaluations}
    logged = {name for row in run.training for name in row.metrics}
    parts = {n.split("/")[1]: n for n in sorted(logged) if n.startswith("reward/") and n.count("/") == 2}
    found = {"evaluations": ("Held-out figures", held_out), "named_rewards": ("Rewards by name", parts)} | LINES
    drawn: dict[str, tuple[str, str] | None] = dict.fromkeys(PANELS)
    with mpl.rc_context(STYLE):
        panels = [("learning_curve", learning_curve.__doc__ or "", learning_curve(run))]
        for name, (title, names) in found.items():
            caption = check_name(next(iter(names.values()))).meaning if names else ""
            panels.append((name, caption, lines(run, title, names)))
        for name, caption, figure in panels:
            if figure is None:
                (folder / f"{name}.png").unlink(missing_ok=True)
                continue
            figure.savefig(folder / f"{name}.png", dpi=150, metadata={"Software": None})
            buffer = io.BytesIO()
            figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
            drawn[name] = caption, "data:image/svg+xml;base64," + base64.b64encode(buffer.getvalue()).decode()
    return drawn
