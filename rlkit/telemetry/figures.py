"""The report's figures. Each function returns None where the run logged nothing to draw."""

from __future__ import annotations

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from rlkit.telemetry.drawing import (
    BLUE,
    CYCLE,
    GREEN,
    GREY,
    LIGHT,
    ORANGE,
    PURPLE,
    RED,
    binned,
    draw_line,
    lines,
    new_figure,
    smooth,
    step_axis,
)
from rlkit.telemetry.record import EvalCurve, RunRecord

TIME_PARTS = (
    ("generate", "time/generate", BLUE),
    ("score", "time/score", ORANGE),
    ("wait for rollouts", "time/wait_rollout", LIGHT),
    ("old log-probs", "time/old_logits", PURPLE),
    ("learner", "time/learner", GREEN),
    ("weight sync", "time/weight_sync", "#4aa3a2"),
    ("checkpoint", "time/checkpoint", "#8c6d46"),
    ("evaluation", "time/eval", "#5d6673"),
)
ON_TOP = ("time/checkpoint", "time/eval")  # not within time/step


def _bars(axes: Axes, run: RunRecord) -> None:
    """Before and after of avg@k for every held-out set, with standard errors."""
    curves = run.averages
    width = 0.36
    top = bottom = 0.0
    for offset, colour, name in ((-width / 2, GREY, "before"), (width / 2, BLUE, "after")):
        points = [(i, getattr(curve, name)) for i, curve in enumerate(curves)]
        points = [(i, point) for i, point in points if point is not None]
        if not points:
            continue
        axes.bar(
            [i + offset for i, _ in points],
            [point.value for _, point in points],
            width * 0.94,
            yerr=[point.error or 0.0 for _, point in points],
            color=colour,
            label=name,
            error_kw={"capsize": 4, "elinewidth": 1.2, "ecolor": "#1f2937"},
        )
        for i, point in points:
            height = max(0.0, point.value + (point.error or 0.0))
            bottom = min(bottom, point.value - (point.error or 0.0))
            axes.annotate(
                f"{point.value:.3f}",
                (i + offset, height),
                xytext=(0, 4),
                textcoords="offset points",
                ha="center",
                fontweight="bold",
            )
            top = max(top, height)
    axes.set_xticks(range(len(curves)), [f"{curve.set}\n{curve.label}" for curve in curves])
    axes.set_xlim(-0.6, len(curves) - 0.4)
    axes.set_ylim(min(0.0, bottom * 1.25), max(top * 1.25, 0.01))
    axes.grid(visible=False, axis="x")
    axes.set(title="Held-out, before and after (bars: standard error)", ylabel="mean score")
    axes.legend(loc="upper left", ncols=2)


def learning_curve(run: RunRecord) -> Figure | None:
    """What was learnt: held-out before and after, beside training reward and held-out by step."""
    steps, rewards = run.metric("reward/mean")
    if not steps and not run.averages:
        return None
    figure = new_figure(1, 2 if run.averages else 1, (11.0, 3.9))
    curve = figure.axes[-1]
    if run.averages:
        _bars(figure.axes[0], run)
    if steps:
        label = "training reward"
        width = smooth(rewards)[1]
        label += f" (mean of {width} steps)" if width > 1 else ""
        draw_line(curve, steps, rewards, label, BLUE)
    for average, colour in zip(run.averages, CYCLE[1:] * len(run.averages), strict=False):
        curve.errorbar(
            [point.step for point in average.points],
            [point.value for point in average.points],
            yerr=[point.error or 0.0 for point in average.points],
            fmt="o-",
            color=colour,
            markersize=4,
            capsize=3,
            linewidth=1.2,
            label=f"held-out {average.set} {average.label}",
        )
    what = [*(["training reward"] if steps else []), *(["held-out"] if run.averages else [])]
    curve.set(title=" and ".join(what).capitalize() + " by step", ylabel="mean score")
    curve.set_ylim(bottom=min(0.0, curve.get_ylim()[0]))
    step_axis(curve)
    curve.legend()
    return figure


def evaluations(run: RunRecord) -> Figure | None:
    """avg@k, pass@k and maj@k by step, each at its largest k, where there are at least three evaluations."""
    largest: dict[tuple[str, str], EvalCurve] = {}  # k descends within a statistic
    for curve in run.evaluations:
        largest.setdefault((curve.set, curve.statistic), curve)
    curves = [curve for curve in largest.values() if len(curve.points) >= 3]
    if not curves:
        return None
    sets = list(dict.fromkeys(curve.set for curve in curves))
    styles = {"avg": "-", "pass": "--", "maj": ":"}
    figure = new_figure()
    axes = figure.axes[0]
    for curve in curves:
        axes.errorbar(
            [point.step for point in curve.points],
            [point.value for point in curve.points],
            yerr=[point.error or 0.0 for point in curve.points],
            linestyle=styles[curve.statistic],
            color=CYCLE[sets.index(curve.set) % len(CYCLE)],
            marker="o",
            markersize=3,
            capsize=2,
            label=f"{curve.set} {curve.label}",
        )
    axes.set(title="Held-out figures by step", ylabel="mean score or fraction")
    step_axis(axes)
    axes.legend(ncols=2)
    return figure


def groups(run: RunRecord) -> Figure | None:
    """Share of groups all correct, all wrong, and mixed (the only ones that teach)."""
    correct, wrong = (
        dict(zip(*run.metric(name), strict=True)) for name in ("group/all_correct_frac", "group/all_wrong_frac")
    )
    steps = sorted(correct.keys() & wrong.keys())
    if not steps:
        return lines(run, [("dead", "group/dead_frac")], "Dead groups", "fraction of groups")
    right, bad = [correct[s] for s in steps], [wrong[s] for s in steps]
    mixed = [1 - a - b for a, b in zip(right, bad, strict=True)]
    centres, width, (right, bad, mixed) = binned(steps, (right, bad, mixed))
    figure = new_figure()
    axes = figure.axes[0]
    base = [0.0] * len(centres)
    for label, values, colour in (
        ("all wrong (dead)", bad, "#e3a5a5"),
        ("mixed: carries signal", mixed, BLUE),
        ("all correct (dead)", right, "#a9d3ba"),
    ):
        axes.bar(centres, values, width, bottom=base, color=colour, label=label, edgecolor=colour, linewidth=0.4)
        base = [a + b for a, b in zip(base, values, strict=True)]
    axes.set(title="Groups", ylabel="share of groups", ylim=(0, 1))
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    axes.margins(x=0)
    step_axis(axes)
    figure.legend(loc="outside lower center", ncols=3)
    return figure


def lengths(run: RunRecord) -> Figure | None:
    """Completion length (mean, and the band from shortest to longest) and share cut off."""
    steps, means = run.metric("completion/length/mean")
    if not steps:
        return None
    cut_steps, cut = run.metric("completion/truncated_frac")
    figure = Figure(figsize=(6.2, 3.0), layout="constrained")
    ratios = [3, 1] if cut_steps else [1]
    figure.subplots(len(ratios), 1, sharex=True, height_ratios=ratios)
    axes = figure.axes[0]
    low, high = (dict(zip(*run.metric(f"completion/length/{name}"), strict=True)) for name in ("min", "max"))
    band = [step for step in steps if step in low and step in high]
    if len(band) > 1:
        axes.fill_between(
            band,
            [low[s] for s in band],
            [high[s] for s in band],
            color=BLUE,
            alpha=0.12,
            linewidth=0,
            label="shortest to longest",
        )
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


def _spent(run: RunRecord, name: str) -> dict[int, float]:
    """Seconds by step; evaluations of several sets are rows of their own and add up."""
    spent: dict[int, float] = {}
    for row in run.training:
        if (value := row.metrics.get(name)) is not None:
            before = spent.get(row.step, 0.0) if name == "time/eval" else 0.0
            spent[row.step] = before + value
    return spent


def time_split(run: RunRecord) -> Figure | None:
    """Seconds of a step by what they went to.

    generate and score are shown in place of wait_rollout where they fit inside it (a synchronous
    run); else they overlapped the learner, and the waiting is shown.
    """
    total = dict(zip(*run.metric("time/step"), strict=True))
    if not total:
        return None
    steps = sorted(total)
    logged = {name: _spent(run, name) for _, name, _ in TIME_PARTS}
    parts = {name: [spent.get(step, 0.0) for step in steps] for name, spent in logged.items()}
    wait, generate, score = (parts[f"time/{name}"] for name in ("wait_rollout", "generate", "score"))
    if sum(wait) == 0.0 or sum(generate) + sum(score) <= 1.02 * sum(wait):
        split = zip(wait, generate, score, strict=True)
        parts["time/wait_rollout"] = [max(0.0, w - g - s) for w, g, s in split]
    else:
        parts["time/generate"] = parts["time/score"] = [0.0] * len(steps)
    both = zip(parts["time/learner"], parts["time/old_logits"], strict=True)
    parts["time/learner"] = [max(0.0, all_of_it - old) for all_of_it, old in both]
    within = [values for name, values in parts.items() if name not in ON_TOP]
    rest = [max(0.0, total[s] - sum(t)) for s, t in zip(steps, zip(*within, strict=True), strict=True)]
    whole = sum(map(sum, parts.values())) + sum(rest)
    rows = [(label, parts[name], colour) for label, name, colour in TIME_PARTS]
    rows.append(("rest", rest, "#eef0f3"))
    rows = [row for row in rows if whole > 0 and sum(row[1]) > 0.002 * whole]
    centres, width, means = binned(steps, [values for _, values, _ in rows])
    figure = new_figure()
    axes = figure.axes[0]
    base = [0.0] * len(centres)
    for (label, values, colour), column in zip(rows, means, strict=True):
        share = f"{label} {sum(values) / whole:.0%}"
        axes.bar(centres, column, width, bottom=base, color=colour, label=share, edgecolor=colour, linewidth=0.4)
        base = [a + b for a, b in zip(base, column, strict=True)]
    axes.set(title="Where a step's time goes", ylabel="seconds")
    axes.margins(x=0)
    step_axis(axes)
    figure.legend(loc="outside right upper")
    return figure


def optimiser(run: RunRecord) -> Figure | None:
    """Gradient norm and learning rate."""
    found = [
        (title, *run.metric(name))
        for title, name in (
            ("Gradient norm before clipping", "policy/grad_norm"),
            ("Learning rate", "learner/learning_rate"),
        )
    ]
    found = [(title, steps, values) for title, steps, values in found if steps]
    if not found:
        return None
    figure = new_figure(1, len(found))
    for axes, (title, steps, values), colour in zip(figure.axes, found, (PURPLE, GREY), strict=False):
        if colour == GREY:
            axes.plot(steps, values, color=GREY, marker="o" if len(steps) == 1 else "")
        else:
            draw_line(axes, steps, values, title, colour)
        axes.set(title=title)
        axes.set_ylim(bottom=0)
        axes.ticklabel_format(axis="y", style="sci", scilimits=(-3, 4))
        step_axis(axes, ticks=4)
    return figure


def named_rewards(run: RunRecord) -> Figure | None:
    """Every named reward, where there are several."""
    names = {n for row in run.training for n in row.metrics if n.startswith("reward/")}
    parts = sorted(n for n in names if n.count("/") == 2 and n.endswith("/mean"))
    if len(parts) < 2:
        return None
    return lines(run, [(n.split("/")[1], n) for n in parts], "Rewards by name", "mean, unweighted")


def warm_start(run: RunRecord) -> Figure | None:
    """Loss of the supervised warm start, by its own steps."""
    figure = lines(run, [("loss", "sft/loss")], "Warm start: loss", "nats per token")
    if figure is not None:
        step_axis(figure.axes[0], "warm-start step")
    return figure
