"""`rlkit dashboard RUN ...`: a curated wandb workspace for runs, its sections as metrics.yaml groups the metrics.

It is built without a network or an account, and written as JSON; with an account it is saved in the runs' project.
"""

import argparse
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from rlkit.telemetry.jsonl import replace_file
from rlkit.telemetry.names import METRICS, SECTIONS, TelemetryError, compiled
from rlkit.telemetry.record import RunRecord, load_run
from rlkit.telemetry.sinks import CLOCK, optional


def build(runs: Sequence[RunRecord], *, entity: str, project: str) -> Any:
    """A wandb_workspaces Workspace: a section for each of SECTIONS, a panel for each metric that the runs logged."""
    workspaces = optional("wandb_workspaces.workspaces", "wandb")
    plots = optional("wandb_workspaces.reports.v2", "wandb")
    logged = sorted({name for run in runs for row in run.training for name in row.metrics})
    found = {m: [n for n in logged if compiled(m.pattern).fullmatch(n) and not n.endswith("_se")] for m in METRICS}
    sections: list[Any] = []
    for title, order in SECTIONS.items():
        metrics = [metric for metric in METRICS if metric.section == title and found[metric]]
        metrics.sort(key=lambda metric: order.index(metric.pattern) if metric.pattern in order else len(order))
        panels = [
            plots.LinePlot(title=m.pattern.removesuffix("[_se]"), title_y=m.unit, x="learner/step", y=found[m])
            for m in metrics
        ]
        if not sections and "reward/mean" in logged:  # the headline also over time, and what the policy wrote
            reward = plots.LinePlot(title="reward/mean by seconds of run time", x=CLOCK, y=["reward/mean"])
            panels += [reward, plots.WeavePanelSummaryTable(table_name="completions")]
        if panels:
            sections.append(workspaces.Section(name=title, panels=panels, is_open=len(sections) < 2))
    settings = workspaces.WorkspaceSettings(x_axis="learner/step")
    return workspaces.Workspace(entity=entity, project=project, name="rlkit", sections=sections, settings=settings)


def main(argv: Sequence[str] | None = None) -> int:
    """Run `rlkit dashboard`; return the exit status. Raises TelemetryError: a folder, the extra, or wandb's refusal."""
    parser = argparse.ArgumentParser(prog="rlkit dashboard", description="A curated wandb workspace for runs.")
    parser.add_argument("run", type=Path, nargs="+", help="run folders, outputs/NAME; all of one wandb project")
    parser.add_argument("--entity", help="wandb user or team that owns the project (default: the account's)")
    parser.add_argument("--output", type=Path, help="file for the workspace (default: dashboard.json in the first run)")
    parser.add_argument("--dry-run", action="store_true", help="only write the file, even with an account")
    options = parser.parse_args(argv)
    runs = [load_run(path) for path in options.run]
    projects = {(run.config.get("telemetry") or {}).get("wandb_project", "rlkit") for run in runs}
    if len(projects) > 1:
        fix = "make one dashboard for each project"
        raise TelemetryError("runs of several wandb projects", key="wandb_project", value=sorted(projects), fix=fix)
    workspace = build(runs, entity=options.entity or "", project=projects.pop())
    place = options.output or options.run[0] / "dashboard.json"
    replace_file(place, workspace._to_model().model_dump_json(by_alias=True, exclude_none=True, indent=1).encode())
    shown = f"{sum(len(section.panels) for section in workspace.sections)} panels"
    say = Console(highlight=False, soft_wrap=True, markup=False).print
    say(f"{place}: wandb workspace for project {workspace.project}, {len(workspace.sections)} sections, {shown}")
    logs = [log for path in options.run for log in sorted(path.glob("wandb/offline-run-*/run-*.wandb"))]
    unsent = [str(log.parent) for log in logs if not log.with_name(log.name + ".synced").exists()]
    wandb = optional("wandb", "wandb")
    try:
        if options.dry_run or not wandb.login(prompt=False):
            why = "as asked" if options.dry_run else "no wandb account is set up here"
            upload = [f"  wandb sync {shlex.join(unsent)}"] if unsent else []
            again = f"  rlkit dashboard {shlex.join(map(str, options.run))}"
            say("\n".join([f"Nothing was sent ({why}). To publish it:", "  wandb login", *upload, again]))
            return 0
        workspace.entity = options.entity or wandb.Api().default_entity
        workspace.save()
    except Exception as error:  # the two libraries' errors have no class in common
        fix = "check `wandb login`, --entity and the network; the project must exist: upload a run (`wandb sync`) first"
        problem = f"wandb did not save the workspace: {error}"
        raise TelemetryError(problem, key="wandb_project", value=workspace.project, fix=fix) from error
    finally:
        wandb.teardown()
    say(f"saved: {workspace.url}")
    return 0
