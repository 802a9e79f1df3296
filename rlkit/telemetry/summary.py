"""summary.json, and the table printed at the end of a run: what was learnt, and where to look."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from rlkit.telemetry.console import duration
from rlkit.telemetry.record import EvalCurve, Point, RunRecord, load_run


def figures(curve: EvalCurve) -> dict[str, float | int | None]:
    """`avg@4_before`, `avg@4_before_se`, `avg@4_after`, `avg@4_after_se` and `avg@4_after_step`."""
    out: dict[str, float | int | None] = {}
    for when, point in (("before", curve.before), ("after", curve.after)):
        out[f"{curve.label}_{when}"] = None if point is None else point.value
        out[f"{curve.label}_{when}_se"] = None if point is None else point.error
    out[f"{curve.label}_after_step"] = None if curve.after is None else curve.after.step
    return out


def summarise(run: RunRecord) -> dict[str, Any]:
    """A run's final figures.

    Keys: name, seed, steps (learner steps trained), planned_steps, seconds (run time, resumes
    summed), eval_set (the first held-out set of the recipe), that set's avg@k figures at the top
    level, and `eval`: set -> figures of avg, pass and maj. None where nothing was measured.
    """
    steps, rewards = run.metric("reward/mean")
    summary: dict[str, Any] = {
        "name": run.name,
        "seed": (run.config or {}).get("seed"),
        "steps": run.trained_steps[-1] if run.trained_steps else 0,
        "planned_steps": run.planned_steps,
        "seconds": run.seconds,
        "reward_last": rewards[-1] if steps else None,
        "eval_set": run.averages[0].set if run.averages else None,
    }
    if run.averages:
        summary |= figures(run.averages[0])
    summary["eval"] = {}
    for curve in run.evaluations:
        summary["eval"].setdefault(curve.set, {}).update(figures(curve))
    return summary


def write_summary(run_dir: Path) -> dict[str, Any]:
    """Write summary.json into a run folder and return what it holds (see `summarise`)."""
    summary = summarise(load_run(run_dir))
    path = run_dir / "summary.json"
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(summary, indent=2, allow_nan=False) + "\n")
    temporary.replace(path)
    return summary


def with_error(point: Point | None, *, signed: bool = False) -> str:
    """A figure with its standard error, "0.412 +- 0.013"; "-" for None."""
    if point is None:
        return "-"
    head = format(point.value, "+.3f" if signed else ".3f")
    return head if point.error is None else f"{head} +- {point.error:.3f}"


def print_summary(run_dir: Path, console: Console | None = None) -> None:
    """Print held-out figures before and after, and the paths of report and learning curve."""
    console = console if console is not None else Console(highlight=False)
    run = load_run(run_dir)
    table = Table(title=Text(f"{run.name}: held-out figures, mean +- standard error"))
    for heading in ("set", "figure", "before", "after", "change"):
        table.add_column(heading, justify="left" if heading in {"set", "figure"} else "right")
    for curve in run.evaluations:
        change = curve.change
        style = ""
        if change is not None and change.error is not None and abs(change.value) > 2 * change.error:
            style = "bold green" if change.value > 0 else "bold red"
        table.add_row(
            Text(curve.set),
            curve.label,
            with_error(curve.before),
            with_error(curve.after),
            Text(with_error(change, signed=True), style=style),
        )
    if run.evaluations:
        console.print(table)
    else:
        console.print("No held-out evaluation in this run.")
    trained = run.trained_steps[-1] if run.trained_steps else 0
    console.print(f"{trained} steps in {duration(run.seconds)}")
    for label, path in (
        ("report", run_dir / "report.html"),
        ("learning curve", run_dir / "plots" / "learning_curve.png"),
    ):
        if path.exists():
            console.print(Text(f"{label}: {path}"), soft_wrap=True)
