"""The report's figures: drawn without a display, kept as PNG, handed to the page as SVG."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import fmean
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from rlkit.telemetry.record import EvalCurve, RunRecord

BLUE, ORANGE, GREEN, RED, PURPLE, GREY = ("#2563a8", "#d9822b", "#2e8b57", "#c23b3b", "#7a4fa3", "#a3a9b3")
CYCLE = (BLUE, ORANGE, GREEN, PURPLE, RED, "#4aa3a2", "#8c6d46", "#5d6673")
STYLE: dict[Any, Any] = {
    "font.family": "DejaVu Sans", "font.size": 9, "axes.spines.top": False, "axes.spines.right": False,
    "axes.edgecolor": "#6b7280", "axes.labelcolor": "#374151", "axes.titlesize": 10, "axes.titleweight": "bold",
    "axes.titlelocation": "left", "axes.grid": True, "axes.axisbelow": True, "grid.color": "#e8eaee",
    "xtick.color": "#4b5563", "ytick.color": "#4b5563", "legend.frameon": False, "legend.fontsize": 8,
    "lines.linewidth": 1.6, "text.parse_math": False, "svg.fonttype": "path", "svg.hashsalt": "rlkit",
}  # fmt: skip
TIME_PARTS = {
    "generate": BLUE, "score": ORANGE, "wait_rollout": "#d4d8de", "old_logits": PURPLE, "learner": GREEN,
    "weight_sync": "#4aa3a2", "checkpoint": "#8c6d46", "eval": "#5d6673",
}  # fmt: skip
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
    return centres, width, [[fmean(column[i] for i in one) for one in members.values()] for column in columns]


def new_figure(rows: int = 1, columns: int = 1, size: tuple[float, float] = (6.2, 3.0), **options: Any) -> Figure:
    """A figure with its axes made; size in inches."""
    figure = Figure(figsize=size, layout="constrained")
    figure.subplots(rows, columns, **options)
    return figure


def step_axis(axes: Axes, label: str = "learner step") -> None:
    """Label the axis of steps, with whole numbers only."""
    axes.set_xlabel(label)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6, steps=[1, 2, 5, 10], min_n_ticks=1))


def draw_line(axes: Axes, steps: Sequence[int], values: Sequence[float], label: str, colour: str) -> None:
    """A metric: thin as logged, thick smoothed; a dot where there is one step only."""
    means, width = smooth(values)
    if width > 1:
        axes.plot(steps, values, color=colour, alpha=0.3, linewidth=0.8)
    axes.plot(steps, means, color=colour, label=label, marker="o" if len(steps) == 1 else "")


def draw_points(axes: Axes, curve: EvalCurve, colour: str, label: str, style: str = "-") -> None:
    """Held-out figures with their standard errors."""
    xs, ys = [p.step for p in curve.points], [p.value for p in curve.points]
    errors = [p.error or 0.0 for p in curve.points]
    axes.errorbar(xs, ys, yerr=errors, linestyle=style, color=colour, marker="o", markersize=4, capsize=3, label=label)


def draw_stack(axes: Axes, steps: Sequence[int], parts: Sequence[tuple[str, Sequence[float], str]]) -> None:
    """Stacked bars of (label, values, colour), binned over steps."""
    centres, width, means = binned(steps, [values for _, values, _ in parts])
    base = [0.0] * len(centres)
    for (label, _, colour), column in zip(parts, means, strict=True):
        axes.bar(centres, column, width, bottom=base, color=colour, label=label, edgecolor=colour, linewidth=0.4)
        base = [a + b for a, b in zip(base, column, strict=True)]
    axes.margins(x=0)


def lines(
    run: RunRecord, names: dict[str, str], title: str, unit: str, *, zero: bool = False, log: bool = False,
    axis: str = "learner step",
) -> Figure | None:  # fmt: skip
    """One axis with the metrics (label -> name) that were logged; `zero`: from 0; `log`: where all are above 0."""
    found = [(label, *run.metric(name)) for label, name in names.items()]
    found = [line for line in found if line[1]]
    if not found:
        return None
    figure = new_figure()
    axes = figure.axes[0]
    for (label, steps, values), colour in zip(found, CYCLE * len(found), strict=False):
        draw_line(axes, steps, values, label, colour)
    everything = [value for _, _, values in found for value in values]
    if log and min(everything) > 0:
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:g}")  # the default one needs text.parse_math
        axes.yaxis.set_minor_formatter("")
    elif zero:
        axes.set_ylim(0, max(everything) * 1.08 or 1.0)
    axes.set(title=title, ylabel=unit)
    step_axis(axes, axis)
    if len(names) > 1:
        axes.legend()
    return figure


def learning_curve(run: RunRecord) -> Figure | None:
    """What was learnt: held-out before and after, beside training reward and held-out by step."""
    steps, rewards = run.metric("reward/mean")
    if not steps and not run.averages:
        return None
    figure = new_figure(1, 2 if run.averages else 1, (11.0, 3.9))
    curve = figure.axes[-1]
    if run.averages:
        _bars(figure.axes[0], run.averages)
    if steps:
        width = smooth(rewards)[1]
        label = "training reward" + (f" (mean of {width} steps)" if width > 1 else "")
        draw_line(curve, steps, rewards, label, BLUE)
    for average, colour in zip(run.averages, CYCLE[1:] * len(run.averages), strict=False):
        draw_points(curve, average, colour, f"held-out {average.set} {average.label}")
    curve.set(title="By learner step", ylabel="mean score")
    curve.set_ylim(bottom=min(0.0, curve.get_ylim()[0]))
    step_axis(curve)
    curve.legend()
    return figure


def _bars(axes: Axes, curves: Sequence[EvalCurve]) -> None:
    """Before and after of avg@k for every held-out set, with standard errors."""
    for offset, colour, name in ((-0.18, GREY, "before"), (0.18, BLUE, "after")):
        points = [(i + offset, getattr(curve, name)) for i, curve in enumerate(curves)]
        points = [(x, point) for x, point in points if point is not None]
        if points:
            heights, errors = [p.value for _, p in points], [p.error or 0.0 for _, p in points]
            bars = axes.bar([x for x, _ in points], heights, 0.34, yerr=errors, color=colour, label=name, capsize=4)
            axes.bar_label(bars, fmt="%.3f", padding=3, fontweight="bold")
    axes.set_xticks(range(len(curves)), [f"{curve.set}\n{curve.label}" for curve in curves])
    axes.set_xlim(-0.6, len(curves) - 0.4)
    axes.margins(y=0.15)
    axes.grid(visible=False, axis="x")
    axes.set(title="Held-out, before and after (bars: standard error)", ylabel="mean score")
    axes.legend(loc="upper left", ncols=2)


def evaluations(run: RunRecord) -> Figure | None:
    """avg@k, pass@k and maj@k by step, each at its largest k, where there are at least three evaluations."""
    largest: dict[tuple[str, str], EvalCurve] = {}  # k descends within a statistic
    for curve in run.evaluations:
        largest.setdefault((curve.set, curve.statistic), curve)
    curves = [curve for curve in largest.values() if len(curve.points) >= 3]
    if not curves:
        return None
    sets = list(dict.fromkeys(curve.set for curve in curves))
    figure = new_figure()
    for curve in curves:
        style = {"avg": "-", "pass": "--", "maj": ":"}[curve.statistic]
        colour = CYCLE[sets.index(curve.set) % len(CYCLE)]
        draw_points(figure.axes[0], curve, colour, f"{curve.set} {curve.label}", style)
    figure.axes[0].set(title="Held-out figures by step", ylabel="mean score or fraction")
    step_axis(figure.axes[0])
    figure.axes[0].legend(ncols=2)
    return figure


def groups(run: RunRecord) -> Figure | None:
    """Share of groups all correct, all wrong, and mixed (the only ones that teach)."""
    steps, right = run.metric("group/all_correct_frac")
    other, wrong = run.metric("group/all_wrong_frac")
    if not steps or steps != other:
        return lines(run, {"dead": "group/dead_frac"}, "Dead groups", "fraction of groups")
    mixed = [1 - a - b for a, b in zip(right, wrong, strict=True)]
    figure = new_figure()
    axes = figure.axes[0]
    shares = (("all wrong (dead)", wrong, "#e3a5a5"), ("mixed: carries signal", mixed, BLUE))
    draw_stack(axes, steps, (*shares, ("all correct (dead)", right, "#a9d3ba")))
    axes.set(title="Groups", ylabel="share of groups", ylim=(0, 1))
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    step_axis(axes)
    figure.legend(loc="outside lower center", ncols=3)
    return figure


def lengths(run: RunRecord) -> Figure | None:
    """Completion length (mean, and the band from shortest to longest) and share cut off."""
    steps, means = run.metric("completion/length/mean")
    if not steps:
        return None
    cut_steps, cut = run.metric("completion/truncated_frac")
    figure = new_figure(2 if cut_steps else 1, sharex=True, height_ratios=[3, 1] if cut_steps else [1])
    axes = figure.axes[0]
    (low_steps, low), (high_steps, high) = (run.metric(f"completion/length/{name}") for name in ("min", "max"))
    if low_steps == high_steps and len(low_steps) > 1:
        axes.fill_between(low_steps, low, high, color=BLUE, alpha=0.12, linewidth=0, label="shortest to longest")
    draw_line(axes, steps, means, "mean", BLUE)
    axes.set(title="Completion length", ylabel="tokens")
    axes.set_ylim(bottom=0)
    axes.legend()
    if cut_steps:
        draw_line(figure.axes[1], cut_steps, cut, "cut", RED)
        figure.axes[1].set(ylabel="cut off", ylim=(0, max(0.02, max(cut) * 1.1)))
        figure.axes[1].yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        figure.axes[1].yaxis.set_major_locator(MaxNLocator(2))
    step_axis(figure.axes[-1])
    return figure


def time_shares(run: RunRecord) -> tuple[list[int], dict[str, list[float]]]:
    """Steps, and seconds of each step by what they went to; parts below 0.2 % of the whole are left out.

    generate and score stand in place of wait_rollout where they fit inside it (a synchronous run); else they
    overlapped the learner, and the waiting is shown. Evaluations of several sets are rows of their own and add up.
    """
    total = dict(zip(*run.metric("time/step"), strict=True))
    parts = {name: dict.fromkeys(total, 0.0) for name in TIME_PARTS}
    for row in run.training:
        for name in TIME_PARTS:
            if (value := row.metrics.get(f"time/{name}")) is not None and row.step in total:
                parts[name][row.step] = value + (parts[name][row.step] if name == "eval" else 0.0)
    rolled = sum(parts["generate"].values()) + sum(parts["score"].values())
    waited = sum(parts["wait_rollout"].values())
    fits = waited == 0.0 or rolled <= 1.02 * waited
    out: dict[str, list[float]] = {name: [] for name in (*TIME_PARTS, "rest")}
    for step, whole in total.items():
        now = {name: parts[name][step] for name in TIME_PARTS}
        if fits:
            now["wait_rollout"] = max(0.0, now["wait_rollout"] - now["generate"] - now["score"])
        else:
            now["generate"] = now["score"] = 0.0
        now["learner"] = max(0.0, now["learner"] - now["old_logits"])
        within = sum(value for name, value in now.items() if name not in ("checkpoint", "eval"))
        for name, value in {**now, "rest": max(0.0, whole - within)}.items():
            out[name].append(value)
    least = 0.002 * sum(map(sum, out.values()))
    return list(total), {name: values for name, values in out.items() if sum(values) > least}


def time_split(run: RunRecord) -> Figure | None:
    """Seconds of a step by what they went to."""
    steps, parts = time_shares(run)
    if not steps or not parts:
        return None
    whole = sum(map(sum, parts.values()))
    colours = TIME_PARTS | {"rest": "#eef0f3"}
    figure = new_figure()
    axes = figure.axes[0]
    stack = [(f"{n.replace('_', ' ')} {sum(v) / whole:.0%}", v, colours[n]) for n, v in parts.items()]
    draw_stack(axes, steps, stack)
    axes.set(title="Where a step's time goes", ylabel="seconds")
    step_axis(axes)
    figure.legend(loc="outside right upper")
    return figure


def named_rewards(run: RunRecord) -> Figure | None:
    """Every named reward, where there are several."""
    names = {n for row in run.training for n in row.metrics if n.startswith("reward/")}
    parts = {n.split("/")[1]: n for n in sorted(names) if n.count("/") == 2 and n.endswith("/mean")}
    return lines(run, parts, "Rewards by name", "mean, unweighted") if len(parts) > 1 else None


def _lines(names: dict[str, str], title: str, unit: str, **options: Any) -> Callable[[RunRecord], Figure | None]:
    return partial(lines, names=names, title=title, unit=unit, **options)


# file name -> (what it shows, how it is drawn)
PANELS: dict[str, tuple[str, Callable[[RunRecord], Figure | None]]] = {
    "learning_curve": ("What was learnt: held-out before and after, and training reward by step.", learning_curve),
    "evaluations": ("Held-out avg@k, pass@k and maj@k.", evaluations),
    "named_rewards": ("Each named reward before its weight.", named_rewards),
    "groups": ("Only mixed groups carry signal.", groups),
    "length": ("Length of completions and share cut at the limit.", lengths),
    "entropy": ("Entropy of the next-token distribution.",
                _lines({"entropy": "policy/entropy"}, "Policy entropy", "nats", zero=True)),
    "grad_norm": ("Gradient norm before clipping.",
                  _lines({"norm": "policy/grad_norm"}, "Gradient norm", "norm", zero=True)),
    "learning_rate": ("Learning rate of the step's last update.",
                      _lines({"rate": "learner/learning_rate"}, "Learning rate", "", zero=True)),
    "kl": ("Distance to the anchor and to the reference model.",
           _lines({"to the old policy": "policy/kl_old", "to the reference": "policy/kl_ref"}, "KL divergence",
                  "nats per token")),
    "clipping": ("Share of tokens whose ratio was clipped.",
                 _lines({"below": "policy/clip_frac/low", "above": "policy/clip_frac/high"}, "Clipped tokens",
                        "fraction", zero=True)),
    "mismatch": ("Engine against learner on the same tokens.",
                 _lines({"mean": "mismatch/logprob_absdiff/mean", "max": "mismatch/logprob_absdiff/max"},
                        "Log-prob mismatch", "nats", log=True)),
    "lag": ("Age of the trained tokens in policy versions.",
            _lines({"mean": "off_policy/lag/mean", "max": "off_policy/lag/max"}, "Staleness", "versions", zero=True)),
    "time": ("Mean seconds of a step, and each part's share.", time_split),
    "throughput": ("Completion tokens trained on per second.",
                   _lines({"tokens/s": "perf/tokens_per_s"}, "Throughput", "tokens per second", zero=True)),
    "warm_start": ("Supervised warm start.",
                   _lines({"loss": "sft/loss"}, "Warm start: loss", "nats per token", axis="warm-start step")),
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Drawn:
    """A drawn panel: its name, what it shows, and its SVG as a data URI for the page."""

    name: str
    caption: str
    svg_uri: str


def draw_all(run: RunRecord) -> tuple[list[Drawn], list[str]]:
    """Draw every panel the run has data for into plots/*.png; return them, and the names of those without data.

    A picture an earlier report drew and this run's metrics no longer support is removed.
    """
    folder = run.run_dir / "plots"
    drawn: list[Drawn] = []
    empty: list[str] = []
    with mpl.rc_context(STYLE):
        for name, (caption, draw) in PANELS.items():
            figure = draw(run)
            if figure is None:
                (folder / f"{name}.png").unlink(missing_ok=True)
                empty.append(name)
                continue
            folder.mkdir(exist_ok=True)
            figure.savefig(folder / f"{name}.png", dpi=150, metadata={"Software": None})
            buffer = io.BytesIO()
            figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
            uri = "data:image/svg+xml;base64," + base64.b64encode(buffer.getvalue()).decode()
            drawn.append(Drawn(name, caption, uri))
    return drawn, empty
