"""`rlkit dashboard RUN ...`: a curated wandb workspace for runs, written as JSON; with an account it is saved there."""

import argparse
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from rlkit.telemetry.names import TelemetryError, check_name, sections
from rlkit.telemetry.record import RunRecord, replace_file
from rlkit.telemetry.sinks import CLOCK, optional


def build(runs: Sequence[RunRecord], *, entity: str, project: str) -> Any:
    """A wandb_workspaces Workspace: metrics.yaml's sections, with a panel for each metric that the runs logged."""
    workspaces = optional("wandb_workspaces.workspaces", "wandb")
    plots = optional("wandb_workspaces.reports.v2", "wandb")
    logged = sorted({name for run in runs for row in run.training for name in row.metrics if not name.endswith("_se")})
    made: list[Any] = []
    for title, metrics in sections().items():
        panels = [
            plots.LinePlot(title=m.pattern.removesuffix("[_se]"), title_y=m.unit, x="learner/step", y=names)
            for m in metrics
            if (names := [name for name in logged if check_name(name) is m])
        ]
        if not made and "reward/mean" in logged:  # the headline also over time, and what the policy wrote
            reward = plots.LinePlot(title="reward/mean by seconds of run time", x=CLOCK, y=["reward/mean"])
            panels += [reward, plots.WeavePanelSummaryTable(table_name="completions")]
        if panels:
            made.append(workspaces.Section(name=title, panels=panels, is_open=len(made) < 2))
    settings = workspaces.WorkspaceSettings(x_axis="learner/step")
    return workspaces.Workspace(entity=entity, project=project, name="rlkit", sections=made, settings=settings)


def main(argv: Sequence[str] | None = None) -> int:
    """Run `rlkit dashboard`; return the exit status. Raises TelemetryError: a folder, the extra, or wandb's refusal."""
    parser = argparse.ArgumentParser(prog="rlkit dashboard", description="A curated wandb workspace for runs.")
    parser.add_argument("run", type=Path, nargs="+", help="run folders, outputs/NAME; all of one wandb project")
    parser.add_argument("--entity", help="wandb user or team that owns the project (default: the account's)")
    parser.add_argument("--dry-run", action="store_true", help="only write dashboard.json, even with an account")
    options = parser.parse_args(argv)
    runs = [RunRecord(path) for path in options.run]
    project, *others = {(run.config.get("telemetry") or {}).get("wandb_project", "rlkit") for run in runs}
    if others:
        fix = "make one dashboard for each project"
        raise TelemetryError("runs of several wandb projects", key="wandb_project", value=[project, *others], fix=fix)
    workspace, place = build(runs, entity=options.entity or "", project=project), options.run[0] / "dashboard.json"
    replace_file(place, workspace._to_model().model_dump_json(by_alias=True, exclude_none=True, indent=1).encode())
    say = Console(highlight=False, soft_wrap=True, markup=False).print
    say(f"{place}: a workspace of {len(workspace.sections)} sections for wandb project {project}")
    folders = [shlex.quote(str(path)) for path in options.run]
    sync = "wandb sync " + " ".join(f"{folder}/wandb/offline-run-*" for folder in folders)
    wandb = optional("wandb", "wandb")
    try:
        if options.dry_run or not wandb.login(prompt=False):
            why = "as asked" if options.dry_run else "no wandb account is set up here"
            say(f"Nothing was sent ({why}). To publish runs and workspace:\n  wandb login\n  {sync}")
            say(f"  rlkit dashboard {' '.join(folders)}")
            return 0
        workspace.entity = options.entity or wandb.Api().default_entity
        workspace.save()
    except Exception as error:  # the two libraries' errors have no class in common
        fix = f"check `wandb login`, --entity and the network; the project must exist: upload a run first: {sync}"
        problem = f"wandb did not save the workspace: {error}"
        raise TelemetryError(problem, key="wandb_project", value=project, fix=fix) from error
    finally:
        wandb.teardown()
    say(f"saved: {workspace.url}")
    return 0
