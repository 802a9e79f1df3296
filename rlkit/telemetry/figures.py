"""The report's figures, kept as PNG and handed to the page as SVG; style and plain figures are in report.yaml."""

import base64
import io
from collections.abc import Sequence
from itertools import cycle
from statistics import fmean

import matplotlib as mpl
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from rlkit.telemetry.names import REPORT, check_name
from rlkit.telemetry.record import RunRecord

CYCLE = ("#2563a8", "#d9822b", "#2e8b57", "#7a4fa3", "#c23b3b", "#6b7280", "#b3a125")
STYLE = REPORT["style"]
LINES: dict[str, tuple[str, dict[str, str]]] = REPORT["lines"]


def smooth(values: Sequence[float]) -> list[float]:
    """Centred rolling mean over about a twentieth of the run."""
    half = len(values) // 40
    return [fmean(values[max(0, i - half) : i + half + 1]) for i in range(len(values))]


def lines(run: RunRecord, title: str, names: dict[str, str], size: tuple[float, float]) -> Figure | None:
    """One axis (inches) with the metrics (label -> name) that were logged, by step, from 0 up; None without any."""
    found = [(label, name, *run.metric(name)) for label, name in names.items() if run.metric(name)[0]]
    if not found:
        return None
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(subplot_kw={"title": title, "ylabel": check_name(found[0][1]).unit})
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6, steps=[1, 2, 5, 10], min_n_ticks=1))
    for (label, name, steps, values), colour in zip(found, cycle(CYCLE), strict=False):
        if name.startswith("eval/"):
            errors = dict(zip(*run.metric(name + "_se"), strict=True))
            whiskers = [errors.get(step, 0.0) for step in steps]
            axes.errorbar(steps, values, yerr=whiskers, color=colour, label=label, marker="o", markersize=4, capsize=3)
        else:
            axes.plot(steps, values, color=colour, alpha=0.3, linewidth=0.8)  # as logged
            axes.plot(steps, smooth(values), color=colour, label=label, marker="o" if len(steps) == 1 else "")
    axes.set_ylim(bottom=min(0.0, axes.get_ylim()[0]))
    if len(found) > 3:  # more would hide the curves
        figure.legend(loc="outside right upper")
    elif len(found) > 1:
        axes.legend()
    return figure


def draw_all(run: RunRecord) -> dict[str, tuple[str, str] | None]:
    """Draw plots/*.png, and remove those without data now; panel -> (caption, SVG as a data URI), None without."""
    folder = run.run_dir / "plots"
    folder.mkdir(exist_ok=True)
    scores = [c for c in run.evaluations if not c.label.startswith("logprob")] or run.evaluations
    held_out, averages = ({f"{c.set} {c.label}": f"eval/{c.set}/{c.label}" for c in x} for x in (scores, run.averages))
    logged = {name for row in run.training for name in row.metrics}
    parts = {n.split("/")[1]: n for n in sorted(logged) if n.startswith("reward/") and n.count("/") == 2}
    panels = {"learning_curve": ("Score by learner step", {"training": "reward/mean"} | averages)}
    panels |= {"evaluations": ("Held-out figures", held_out), "named_rewards": ("Rewards by name", parts)} | LINES
    drawn: dict[str, tuple[str, str] | None] = dict.fromkeys(panels)
    for name, (title, metrics) in panels.items():
        with mpl.rc_context(STYLE):
            figure = lines(run, title, metrics, (11.0, 3.9) if name == "learning_curve" else (4.4, 2.7))
            if figure is None:
                (folder / f"{name}.png").unlink(missing_ok=True)
                continue
            figure.savefig(folder / f"{name}.png", dpi=150, metadata={"Software": None})
            buffer = io.BytesIO()
            figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
        data = base64.b64encode(buffer.getvalue()).decode()
        drawn[name] = check_name(next(iter(metrics.values()))).meaning, f"data:image/svg+xml;base64,{data}"
    return drawn
