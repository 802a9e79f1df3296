"""What a run leaves for people: report.html with plots/, summary.json, and the table printed at the end."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, StrictUndefined
from rich.console import Console
from rich.text import Text

from rlkit.telemetry.environment import redact
from rlkit.telemetry.figures import draw_all
from rlkit.telemetry.findings import findings
from rlkit.telemetry.names import TelemetryError, read_resource
from rlkit.telemetry.record import RunRecord, read_mapping, replace_file, with_error
from rlkit.telemetry.rollouts import COLOURS, examples, facts, judged_rollouts, rollout_steps, visible
from rlkit.telemetry.sinks import duration

SAMPLES = 2  # completions of each verdict shown for a step


def _stage(run: RunRecord, step: int) -> dict[str, Any]:
    """A few samples of each verdict of a step, one of each prompt before a second one."""
    rows = judged_rollouts(run.run_dir, step, run.config)
    found = Counter(row["verdict"] for row in rows)
    counts = ", ".join(f"{found[verdict]} {verdict}" for verdict in COLOURS if found[verdict])
    chosen = [row | {"facts": facts(row)} for row in examples(rows, SAMPLES)]
    return {"step": step, "counts": f"{counts} of {len(rows)}", "rows": chosen}


def write_report(run_dir: Path) -> Path:
    """Write report.html and plots/*.png into a run folder, the same bytes for the same files; returns its path."""
    run = RunRecord(run_dir)
    steps, stages, no_samples = rollout_steps(run_dir), [], "No rollouts were kept (telemetry.save_rollouts)."
    try:
        stages = [_stage(run, step) for step in dict.fromkeys((*steps[:1], *steps[-1:]))]
    except TelemetryError as error:
        no_samples = f"The rollouts cannot be read: {error.problem}"
    page = Environment(autoescape=True, undefined=StrictUndefined)
    page.filters |= {"visible": visible, "duration": duration, "with_error": with_error}
    held = {"config.yaml": redact(run.config), "environment.json": read_mapping(run_dir / "environment.json")}
    documents = {name: yaml.safe_dump(content, sort_keys=False) if content else "" for name, content in held.items()}
    html = page.from_string(read_resource("templates/report.html.j2")).render(
        run=run, findings=findings(run), drawn=draw_all(run), stages=stages, no_samples=no_samples, documents=documents
    )
    replace_file(run_dir / "report.html", html.encode())
    return run_dir / "report.html"


def main(run_dir: Path) -> None:
    """Write the report of a run folder and print its path."""
    Console(highlight=False).print(Text(str(write_report(run_dir))), soft_wrap=True)


def write_summary(run_dir: Path) -> dict[str, Any]:
    """Write summary.json into a run folder and return what it holds.

    The avg@k figures of eval_set, the recipe's first, are at the top level too. None where nothing was measured.
    """
    run = RunRecord(run_dir)
    first = next(iter(run.averages), None)
    summary: dict[str, Any] = {
        "name": run.name, "seed": run.config.get("seed"),
        "steps": run.last_step, "planned_steps": run.config.get("steps"), "seconds": run.seconds,
        "reward_last": next(reversed(run.metric("reward/mean")[1]), None),
        "eval_set": first and first.set, **(first.figures() if first else {}),
        "eval": {},
    }  # fmt: skip
    for curve in run.evaluations:
        summary["eval"].setdefault(curve.set, {}).update(curve.figures())
    replace_file(run_dir / "summary.json", (json.dumps(summary, indent=2, allow_nan=False) + "\n").encode())
    return summary


def print_summary(run_dir: Path, console: Console | None = None) -> None:
    """Print held-out figures before and after, and the paths of report and learning curve."""
    console = console or Console(highlight=False, soft_wrap=True)  # a line a figure, also in a log
    run = RunRecord(run_dir)
    for curve in run.evaluations:
        held = f"{curve.set} {curve.label}: {with_error(curve.before)} before, {with_error(curve.after)} after"
        sure = curve.change is not None and curve.change.sure
        console.print(Text(f"{held}, change {with_error(curve.change, '+')}", style="bold" if sure else ""))
    console.print(f"{run.last_step} steps in {duration(run.seconds)}")
    for label, place in (("report", "report.html"), ("learning curve", "plots/learning_curve.png")):
        if (run_dir / place).exists():
            console.print(Text(f"{label}: {run_dir / place}"), soft_wrap=True)
