"""Weights & Biases: offline without account or network, or online.

Everything is kept inside the run folder. The step axis is the learner's own (`learner/step`), not
wandb's, so that a resumed run may log a step again; warm-start rows have `sft/step`.
"""

from __future__ import annotations

import importlib
import logging
import os
import secrets
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rlkit.telemetry.jsonl import Metrics, axis_of
from rlkit.telemetry.names import LEARNER_STEP, MetricError

logger = logging.getLogger(__name__)

MODES = ("offline", "online")
INIT_DEADLINE_S = 60.0
FINISH_DEADLINE_S = 120.0


class WandbSink:
    """Log rows to one wandb run, whose id is kept in the run folder and used again on resume.

    wandb writes to `run_dir/wandb/`; `mode` is "offline" or "online", `config` the resolved recipe.
    Raises MetricError: wandb is not installed, the mode is unknown, or the run cannot be started.
    """

    def __init__(self, run_dir: Path, *, project: str, name: str, mode: str, config: Mapping[str, Any]) -> None:
        def refused(problem: str, fix: str) -> MetricError:
            expected = "off, offline or online"
            return MetricError(problem, key="telemetry.wandb", value=mode, expected=expected, fix=fix)

        if mode not in MODES:
            raise refused("unknown mode", "set telemetry.wandb=offline")
        if mode == "offline":
            # Before the import: wandb reports its own errors to its makers over the network.
            os.environ["WANDB_ERROR_REPORTING"] = "false"
        try:
            self._wandb: Any = importlib.import_module("wandb")
        except ImportError as error:
            raise refused("wandb is not installed", "pip install wandb, or set telemetry.wandb=off") from error
        folder = run_dir / "wandb"
        folder.mkdir(parents=True, exist_ok=True)
        quiet = dict.fromkeys(
            ("silent", "disable_git", "disable_code", "x_disable_machine_info", "x_disable_meta"), True
        )
        settings = self._wandb.Settings(
            init_timeout=INIT_DEADLINE_S,
            login_timeout=INIT_DEADLINE_S,
            console="off",
            x_save_requirements=False,
            **quiet,
        )
        identity = {"project": project, "name": name, "id": _run_id(folder), "dir": str(run_dir), "mode": mode}
        resume = "allow" if mode == "online" else None
        try:
            self._run = self._wandb.init(**identity, resume=resume, config=dict(config), settings=settings)
        except self._wandb.errors.Error as error:
            raise refused(
                f"wandb could not start: {error}", "run `wandb login`, or set telemetry.wandb=offline"
            ) from error
        self._run.define_metric("learner/step")
        self._run.define_metric("sft/step")
        self._run.define_metric("*", step_metric="learner/step")
        self._run.define_metric("sft/*", step_metric="sft/step")
        self._closed = False

    def log(self, step: int, metrics: Metrics) -> None:
        """Log one row; values that are None are left out."""
        axis = "learner/step" if axis_of(metrics) == LEARNER_STEP else "sft/step"
        self._run.log({axis: step, **{k: v for k, v in metrics.items() if v is not None}})

    def close(self, *, failed: bool = False) -> None:
        """Finish the run and end wandb's service process, within FINISH_DEADLINE_S."""
        if self._closed:
            return
        self._closed = True
        errors: list[BaseException] = []

        def finish() -> None:
            try:
                self._run.finish(exit_code=int(failed))
                self._wandb.teardown(exit_code=int(failed))
            except Exception as error:  # handed to the caller below
                errors.append(error)

        # A thread, because finishing waits for the upload and takes no time limit.
        thread = threading.Thread(target=finish, name="wandb-finish", daemon=True)
        thread.start()
        thread.join(FINISH_DEADLINE_S)
        if thread.is_alive():
            text = "wandb did not finish within %.0f s; the data is in %s: upload with `wandb sync`"
            logger.error(text, FINISH_DEADLINE_S, self._run.dir)
        if errors:
            raise errors[0]


def _run_id(folder: Path) -> str:
    """The id of the run folder's wandb run, made on first use."""
    path = folder / "rlkit_run_id"
    if not path.exists():
        path.write_text(secrets.token_hex(4))
    return path.read_text().strip()
