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

    Args:
        run_dir: the run folder; wandb writes to `run_dir/wandb/`.
        project: wandb project.
        name: name of the run.
        mode: "offline" or "online".
        config: the resolved recipe.

    Raises:
        MetricError: wandb is not installed, the mode is unknown, or the run cannot be started.
    """

    def __init__(self, run_dir: Path, *, project: str, name: str, mode: str, config: Mapping[str, Any]) -> None:
        if mode not in MODES:
            raise MetricError(
                "unknown mode",
                key="telemetry.wandb",
                value=mode,
                expected="off, offline or online",
                fix="set telemetry.wandb=offline",
            )
        if mode == "offline":
            # Before the import: wandb reports its own errors to its makers over the network.
            os.environ["WANDB_ERROR_REPORTING"] = "false"
        try:
            self._wandb: Any = importlib.import_module("wandb")
        except ImportError as error:
            raise MetricError(
                "wandb is not installed",
                key="telemetry.wandb",
                value=mode,
                fix="pip install wandb, or set telemetry.wandb=off",
            ) from error
        folder = run_dir / "wandb"
        folder.mkdir(parents=True, exist_ok=True)
        settings = self._wandb.Settings(
            init_timeout=INIT_DEADLINE_S,
            login_timeout=INIT_DEADLINE_S,
            console="off",
            silent=True,
            disable_git=True,
            disable_code=True,
            x_disable_machine_info=True,
            x_disable_meta=True,
            x_save_requirements=False,
        )
        try:
            self._run = self._wandb.init(
                project=project,
                name=name,
                id=_run_id(folder),
                dir=str(run_dir),
                mode=mode,
                resume="allow" if mode == "online" else None,
                config=dict(config),
                settings=settings,
            )
        except self._wandb.errors.Error as error:
            raise MetricError(
                f"wandb could not start: {error}",
                key="telemetry.wandb",
                value=mode,
                fix="run `wandb login`, or set telemetry.wandb=offline",
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

    def summarise(self, summary: Mapping[str, Any]) -> None:
        """Put the run's final figures into wandb's summary."""
        self._run.summary.update(dict(summary))

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
            except Exception as error:  # noqa: BLE001 - handed to the caller below
                errors.append(error)

        # A thread, because finishing waits for the upload and takes no time limit.
        thread = threading.Thread(target=finish, name="wandb-finish", daemon=True)
        thread.start()
        thread.join(FINISH_DEADLINE_S)
        if thread.is_alive():
            logger.error(
                "wandb did not finish within %.0f s; the data is in %s: upload with `wandb sync`",
                FINISH_DEADLINE_S,
                self._run.dir,
            )
        if errors:
            raise errors[0]


def _run_id(folder: Path) -> str:
    """The id of the run folder's wandb run, made on first use."""
    path = folder / "rlkit_run_id"
    if not path.exists():
        path.write_text(secrets.token_hex(4))
    return path.read_text().strip()
