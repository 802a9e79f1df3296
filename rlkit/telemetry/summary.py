"""summary.json, and the table printed at the end of a run: what was learnt, and where to look."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from rlkit.telemetry.console import duration
from rlkit.telemetry.record import EvalCurve, load_run, with_error


def figures(curve: EvalCurve) -> dict[str, float | int | None]:
    """`avg@4_before`, `avg@4_before_se`, `avg@4_after`, `avg@4_after_se` and `avg@4_after_step`."""
    out = {}
    for when, point in (("before", curve.before), ("after", curve.after)):
        out[f"{curve.label}_{when}"] = None if point is None else point.value
        out[f"{curve.label}_{when}_se"] = None if point is None else point.error
    return out | {f"{curve.label}_after_step": None if curve.after is None else curve.after.step}


def write_summary(run_dir: Path) -> dict[str, Any]:
    """Write summary.json into a run folder and return what it holds.

    Keys: name, seed, steps (learner steps trained), planned_steps, seconds (run time, resumes summed),
    eval_set (the first held-out set of the recipe), that set's avg@k figures at the top level, and
    `eval`: set -> figures of avg, pass and maj. None where nothing was measured.
    """
    run = load_run(run_dir)
    first = next(iter(run.averages), None)
    rewards = run.metric("reward/mean")[1]
    summary: dict[str, Any] = {
        "name": run.name,
        "seed": run.config.get("seed"),
        "steps": run.last_step,
        "planned_steps": run.config.get("steps"),
        "seconds": run.seconds,
        "reward_last": rewards[-1] if rewards else None,
        "eval_set": first and first.set,
        **(figures(first) if first else {}),
        "eval": {},
    }
    for curve in run.evaluations:
        summary["eval"].setdefault(curve.set, {}).update(figures(curve))
    temporary = run_dir / "summary.json.tmp"
    temporary.write_text(json.dumps(summary, indent=2, allow_nan=False) + "\n")
    temporary.replace(run_dir / "summary.json")
    return summary


def print_summary(run_dir: Path, console: Console | None = None) -> None:
    """Print held-out figures before and after, and the paths of report and learning curve."""
    console = console or Console(highlight=False)
    run = load_run(run_dir)
    table = Table("set", "figure", title=Text(f"{run.name}: held-out figures, mean +- standard error"))
    for heading in ("before", "after", "change"):
        table.add_column(heading, justify="right")
    for curve in run.evaluations:
        change = curve.change
        sure = change is not None and change.error is not None and abs(change.value) > 2 * change.error
        style = "" if change is None or not sure else "bold green" if change.value > 0 else "bold red"
        changed = Text(with_error(change, "+"), style)
        table.add_row(Text(curve.set), curve.label, with_error(curve.before), with_error(curve.after), changed)
    console.print(table if run.evaluations else "No held-out evaluation in this run.")
    console.print(f"{run.last_step} steps in {duration(run.seconds)}")
    for label, place in (("report", "report.html"), ("learning curve", "plots/learning_curve.png")):
        if (run_dir / place).exists():
            console.print(Text(f"{label}: {run_dir / place}"), soft_wrap=True)
