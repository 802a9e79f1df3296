"""Weights & Biases: offline without account or network, or online.

Everything is kept inside the run folder. The step axis is the learner's own (`learner/step`), not
wandb's, so that a resumed run may log a step again; warm-start rows have `sft/step`.
"""

from __future__ import annotations

import importlib
import logging
import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rlkit.telemetry.names import MetricError, Metrics, is_warm_start

logger = logging.getLogger(__name__)

DEADLINES_S = {"init_timeout": 60.0, "login_timeout": 60.0, "finish_timeout": 120.0}
QUIET = ("silent", "disable_git", "disable_code", "x_disable_machine_info", "x_disable_meta", "finish_timeout_raises")


class WandbSink:
    """Log rows to one wandb run, whose id is kept in the run folder and used again on resume.

    wandb writes to `run_dir/wandb/`; `mode` is "offline" or "online", `config` the resolved recipe.
    Raises MetricError: wandb is not installed, or the run cannot be started.
    """

    def __init__(self, run_dir: Path, *, project: str, name: str, mode: str, config: Mapping[str, Any]) -> None:
        if mode == "offline":
            # Before the import: wandb reports its own errors to its makers over the network.
            os.environ["WANDB_ERROR_REPORTING"] = "false"
        try:
            self._wandb: Any = importlib.import_module("wandb")
        except ImportError as error:
            fix = "pip install wandb, or set telemetry.wandb=off"
            raise MetricError("wandb is not installed", key="telemetry.wandb", value=mode, fix=fix) from error
        identity = run_dir / "wandb" / "rlkit_run_id"
        if not identity.exists():
            identity.parent.mkdir(parents=True, exist_ok=True)
            identity.write_text(secrets.token_hex(4))
        quiet: dict[str, Any] = {"console": "off", "x_save_requirements": False, **dict.fromkeys(QUIET, True)}
        run = {"project": project, "name": name, "id": identity.read_text().strip(), "dir": str(run_dir), "mode": mode}
        resume, settings = "allow" if mode == "online" else None, self._wandb.Settings(**DEADLINES_S, **quiet)
        try:
            self._run: Any = self._wandb.init(**run, resume=resume, config=dict(config), settings=settings)
        except self._wandb.errors.Error as error:
            problem, fix = f"wandb could not start: {error}", "run `wandb login`, or set telemetry.wandb=offline"
            raise MetricError(problem, key="telemetry.wandb", value=mode, fix=fix) from error
        for axis, names in (("learner/step", "*"), ("sft/step", "sft/*")):
            self._run.define_metric(axis)
            self._run.define_metric(names, step_metric=axis)

    def log(self, step: int, metrics: Metrics) -> None:
        """Log one row; values that are None are left out."""
        axis = "sft/step" if is_warm_start(metrics) else "learner/step"
        self._run.log({axis: step, **{k: v for k, v in metrics.items() if v is not None}})

    def close(self, *, failed: bool = False) -> None:
        """Finish the run, within DEADLINES_S, and end wandb's service process; twice is harmless."""
        run, self._run = self._run, None
        if run is None:
            return
        try:
            run.finish(exit_code=int(failed))
        except TimeoutError:
            logger.error("wandb did not finish in time; the data is in %s: upload with `wandb sync`", run.dir)
        self._wandb.teardown(exit_code=int(failed))
