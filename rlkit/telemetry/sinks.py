"""Where metrics go: one `Telemetry` checks every name and hands each row to its sinks: file, wandb, console."""

import importlib
import logging
import os
import secrets
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Protocol, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text

from rlkit.config.schema import TelemetryConfig
from rlkit.telemetry.jsonl import JsonlSink
from rlkit.telemetry.names import EVAL_NAME, Metrics, TelemetryError, check_name, is_warm_start

logger = logging.getLogger(__name__)

DEADLINES_S = {"init_timeout": 60.0, "login_timeout": 60.0, "finish_timeout": 120.0}
QUIET = ("silent", "disable_git", "disable_code", "x_disable_machine_info", "x_disable_meta", "finish_timeout_raises")
FIELDS = (
    ("reward", "reward/mean", ".3f"),
    ("dead", "group/dead_frac", ".0%"),
    ("length", "completion/length/mean", ".1f"),
    ("entropy", "policy/entropy", ".3f"),
    ("loss", "sft/loss", ".4f"),
    ("s/step", "time/step", ".2f"),
)
PACE_WINDOW_S = 3600.0  # the time left is told by the pace of the steps in it


class Sink(Protocol):
    """Takes rows of metrics until it is closed."""

    def log(self, step: int, metrics: Metrics) -> None:
        """Take one row; names are known to the registry."""

    def close(self, *, failed: bool = False) -> None:
        """Let go of everything; `failed` says that the run ended in an error."""


class WandbSink:
    """Log rows to one Weights & Biases run, all of it inside the run folder; a resumed run keeps its id.

    The step axis is ours (`learner/step`, or `sft/step`), so that a resumed run may log a step again. `mode` is
    "offline" (no account, no network) or "online". Raises TelemetryError: not installed, or the run cannot start.
    """

    def __init__(self, run_dir: Path, *, project: str, name: str, mode: str, config: Mapping[str, Any]) -> None:
        if mode == "offline":
            # Before the import: wandb reports its own errors to its makers over the network.
            os.environ["WANDB_ERROR_REPORTING"] = "false"
        try:
            self._wandb: Any = importlib.import_module("wandb")
        except ImportError as error:
            fix = "pip install wandb, or set telemetry.wandb=off"
            raise TelemetryError("wandb is not installed", key="telemetry.wandb", value=mode, fix=fix) from error
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
            raise TelemetryError(problem, key="telemetry.wandb", value=mode, fix=fix) from error
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


def duration(seconds: float) -> str:
    """Short form of a time span: 42 s, 2 min, 1 h 1 min."""
    if seconds < 99.5:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60} min"


def figure(value: float | None, spec: str) -> str:
    """A number in its format; "not finite" for null."""
    return "not finite" if value is None else format(value, spec)


class ConsoleSink:
    """Progress bar with steps and time left on a terminal; plain lines anywhere else.

    `total_steps`: learner steps of the whole run, or updates of a warm start; `start_step` of them are done already.
    """

    def __init__(self, total_steps: int, *, start_step: int = 0, console: Console | None = None) -> None:
        self.console = console or Console(highlight=False)
        self.total = total_steps
        columns = (BarColumn(None), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("ETA"), TimeRemainingColumn())
        plain = not self.console.is_terminal
        self._progress = Progress(*columns, console=self.console, disable=plain, speed_estimate_period=PACE_WINDOW_S)
        self._progress.add_task("steps", total=total_steps, completed=start_step)
        self._progress.start()

    def log(self, step: int, metrics: Metrics) -> None:
        """Show one row: a step's summary, held-out figures, or both."""
        shown = [f"{label} {figure(metrics[name], spec)}" for label, name, spec in FIELDS if name in metrics]
        if shown:
            (task,) = self._progress.tasks
            self._progress.update(task.id, completed=step)
            if self._progress.disable and task.time_remaining:
                shown.append(f"ETA {duration(task.time_remaining)}")
            kind = "sft " if is_warm_start(metrics) else ""
            self._print("  ".join([f"{kind}step {step}/{self.total}", *shown]))
        for name, value in metrics.items():
            if match := EVAL_NAME.fullmatch(name):
                error = metrics.get(name + "_se")
                tail = "" if error is None else f" +- {error:.3f}"
                self._print(f"step {step}  eval {match[1]}  {match[2]} {figure(value, '.3f')}{tail}", "bold cyan")

    def _print(self, line: str, style: str = "") -> None:
        self.console.print(Text(line, style=style), soft_wrap=True)

    def close(self, *, failed: bool = False) -> None:
        """Take the bar down and leave the cursor visible; closing twice is harmless."""
        self._progress.stop()


class Telemetry:
    """Fan out rows to sinks, and own them: a context manager that always closes every one."""

    def __init__(self, sinks: Sequence[Sink]) -> None:
        self.sinks = tuple(sinks)

    @classmethod
    def open(
        cls, telemetry: TelemetryConfig, run_dir: Path, *, name: str, total_steps: int, config: Mapping[str, Any],
        resume_step: int | None = None,
    ) -> Self:  # fmt: skip
        """Make the sinks a recipe asks for; `config` is the resolved recipe as plain containers, for wandb.

        `resume_step` is the step of the checkpoint the run goes on from (later rows are removed), None for a new run.
        Raises TelemetryError: wandb is asked for and cannot be started, or metrics.jsonl is broken.
        """
        with ExitStack() as undo:
            sinks: list[Sink] = [JsonlSink(run_dir, resume_step)]
            undo.callback(sinks[0].close)
            if telemetry.wandb != "off":
                project, mode = telemetry.wandb_project, telemetry.wandb
                sinks.append(WandbSink(run_dir, project=project, name=name, mode=mode, config=config))
            if telemetry.console:
                sinks.append(ConsoleSink(total_steps, start_step=max(0, resume_step or 0)))
            undo.pop_all()
        return cls(sinks)

    def log(self, step: int, metrics: Metrics) -> None:
        """Hand one row to every sink. TelemetryError: unknown name, or warm-start and training names mixed."""
        if len({check_name(name).pattern.startswith("sft/") for name in metrics}) > 1:
            problem = "one row mixes warm-start and training metrics, whose steps count different things"
            raise TelemetryError(problem, key="metrics", value=sorted(metrics), fix="log sft/* in rows of their own")
        for sink in self.sinks:
            sink.log(step, metrics)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Close all sinks, the others too when one fails; the failure is raised afterwards."""
        with ExitStack() as stack:
            for sink in self.sinks:
                stack.callback(sink.close, failed=kind is not None)
