"""Where metrics go: one `Telemetry` checks every name and hands each row to file, wandb, TensorBoard, console."""

import importlib
import logging
import math
import os
import secrets
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from numbers import Real
from pathlib import Path
from typing import Any, Self, TypeAlias

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text

from rlkit.config.schema import TelemetryConfig
from rlkit.telemetry.environment import redact
from rlkit.telemetry.names import EVAL_NAME, REPORT, Metrics, TelemetryError, alias, check_name, is_warm_start
from rlkit.telemetry.record import Row, RunRecord, read_metrics, replace_file
from rlkit.telemetry.rollouts import examples, judged_rollouts, rollout_steps

logger = logging.getLogger(__name__)

CLOCK = "run/seconds"
TABLE = ("step", "prompt_id", "prompt", "completion", "reference", "answer", "score", "verdict", "finish_reason")
TABLE_ROWS = 4  # of each verdict
FIELDS: dict[str, tuple[str, str]] = REPORT["console"]
PACE_WINDOW_S = 3600.0  # the time left is told by the pace of the steps in it


class JsonlSink:
    """Append rows to run_dir/metrics.jsonl, each flushed, so that a killed run leaves what it knew.

    Training rows after `resume_step`, where the run goes on, are removed. Raises TelemetryError: a broken file.
    """

    def __init__(self, run_dir: Path, resume_step: int | None = None) -> None:
        rows = read_metrics(run_dir)
        self.started = time.monotonic() - max((row.seconds for row in rows), default=0.0)  # what was lost counts too
        self._warned: set[str] = set()
        last = math.inf if resume_step is None else resume_step
        kept = [row.line() for row in rows if is_warm_start(row.metrics) or row.step <= last]
        replace_file(run_dir / "metrics.jsonl", b"".join(kept))  # a torn line goes too
        self._file = (run_dir / "metrics.jsonl").open("ab")

    def log(self, step: int, metrics: Metrics) -> None:
        """Write one line; what is not finite becomes null, warned once a name. TelemetryError: not a number."""
        values: dict[str, float | None] = {}
        for name, value in metrics.items():
            if not isinstance(value, Real | None):
                problem, fix = f"a metric is a number, not {type(value).__name__}", "log float(value) or value.item()"
                raise TelemetryError(problem, key=name, value=value, fix=fix)
            values[name] = None if value is None or not math.isfinite(value) else float(value)
            if value is not None and values[name] is None and name not in self._warned:
                self._warned.add(name)
                logger.warning("%s is %s at step %d; written as null, said once", name, value, step)
        row = Row(step, round(time.time(), 3), round(time.monotonic() - self.started, 3), values)
        self._file.write(row.line())
        self._file.flush()

    def close(self, *, failed: bool = False) -> None:
        self._file.close()


def optional(module: str, extra: str) -> Any:
    """Import what only an extra of the package installs; TelemetryError where it is not there."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        fix = f"pip install 'rlkit-rlvr[{extra}]', or set telemetry.{extra}={'off' if extra == 'wandb' else 'false'}"
        raise TelemetryError(f"{module} cannot be imported: {error}", key=f"telemetry.{extra}", fix=fix) from error


def published(metrics: Metrics, library: str) -> dict[str, float]:
    """A row without None, each value also under the name that a library of aliases.yaml has for it."""
    known = {name: value for name, value in metrics.items() if value is not None}
    return known | {theirs: value for name, value in known.items() if (theirs := alias(name, library))}


class WandbSink:
    """Log rows to one Weights & Biases run, all of it inside the run folder; a resumed run keeps its id.

    The axes are ours: `learner/step` or `sft/step`, so that a resumed run may log a step again, and `run/seconds` since
    `started` (monotonic clock; earlier parts of the run counted in). The summary ends with the held-out figures of
    summary.json. Raises TelemetryError: the run cannot start.
    """

    def __init__(
        self, run_dir: Path, telemetry: TelemetryConfig, *, name: str, config: Mapping[str, Any], started: float
    ) -> None:
        mode, project, shown = telemetry.wandb, telemetry.wandb_project, redact(config)  # it may leave the machine
        if mode == "offline":
            os.environ["WANDB_ERROR_REPORTING"] = "false"  # before the import: it tells its makers its own errors
        self._wandb = optional("wandb", "wandb")
        self._run_dir, self._telemetry, self._config, self._started = run_dir, telemetry, config, started
        self._tabled = 0  # step of the last table
        identity = run_dir / "wandb" / "rlkit_run_id"
        if not identity.exists():
            replace_file(identity, secrets.token_hex(4).encode())
        try:
            self._run: Any = self._wandb.init(
                project=project, name=name, id=identity.read_text().strip(), dir=str(run_dir), mode=mode, config=shown,
                resume="allow" if mode == "online" else None, settings=self._wandb.Settings(**REPORT["wandb"]),
            )  # fmt: skip
        except self._wandb.errors.Error as error:
            problem, fix = f"wandb could not start: {error}", "run `wandb login`, or set telemetry.wandb=offline"
            raise TelemetryError(problem, key="telemetry.wandb", value=mode, fix=fix) from error
        self._run.define_metric(CLOCK)
        for axis, names in (("learner/step", "*"), ("sft/step", "sft/*")):
            self._run.define_metric(axis, step_metric=CLOCK)
            self._run.define_metric(names, step_metric=axis)

    def log(self, step: int, metrics: Metrics) -> None:
        axis = "sft/step" if is_warm_start(metrics) else "learner/step"
        row: dict[str, Any] = {axis: step, CLOCK: time.monotonic() - self._started}
        row |= published(metrics, self._telemetry.aliases)
        every = self._telemetry.completions_every_steps
        due = every and (step % every == 0 or any(name.startswith("eval/") for name in metrics))
        if due and axis == "learner/step" and step != self._tabled and step in rollout_steps(self._run_dir):
            self._tabled = step
            kept = examples(judged_rollouts(self._run_dir, step, self._config), TABLE_ROWS)
            row["completions"] = self._wandb.Table(list(TABLE), [[one[key] for key in TABLE] for one in kept])
        self._run.log(row)

    def close(self, *, failed: bool = False) -> None:
        """Finish the run, within its finish_timeout, and end wandb's service process."""
        run, self._run = self._run, None
        if run is None:
            return
        try:
            for curve in RunRecord(self._run_dir).evaluations:
                run.summary.update({f"eval/{curve.set}/{name}": value for name, value in curve.figures().items()})
            run.finish(exit_code=int(failed))
        except TimeoutError:
            logger.error("wandb did not finish in time; the data is in %s: upload with `wandb sync`", run.dir)
        finally:
            self._wandb.teardown(exit_code=int(failed))


class TensorboardSink:
    """Scalars at their step in run_dir/tensorboard, each row flushed; a resumed run hides steps after `resume_step`."""

    def __init__(self, run_dir: Path, telemetry: TelemetryConfig, resume_step: int | None = None) -> None:
        writer = optional("torch.utils.tensorboard", "tensorboard").SummaryWriter
        self._writer: Any = writer(run_dir / "tensorboard", purge_step=None if resume_step is None else resume_step + 1)
        self._library = telemetry.aliases

    def log(self, step: int, metrics: Metrics) -> None:
        for name, value in published(metrics, self._library).items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self, *, failed: bool = False) -> None:
        self._writer.close()


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
    """Progress bar with steps (of a warm start: updates) and time left on a terminal; plain lines anywhere else."""

    def __init__(self, total_steps: int, *, start_step: int = 0, console: Console | None = None) -> None:
        self.console = console or Console(highlight=False)
        self.total = total_steps
        columns = (BarColumn(None), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("ETA"), TimeRemainingColumn())
        plain = not self.console.is_terminal
        self._progress = Progress(*columns, console=self.console, disable=plain, speed_estimate_period=PACE_WINDOW_S)
        self._progress.add_task("steps", total=total_steps, completed=start_step)
        self._progress.start()

    def log(self, step: int, metrics: Metrics) -> None:
        shown = [f"{label} {figure(metrics[name], spec)}" for label, (name, spec) in FIELDS.items() if name in metrics]
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
        self._progress.stop()


# Takes rows, of known names and None for what was not finite, until it is closed, which it may be twice.
Sink: TypeAlias = JsonlSink | TensorboardSink | WandbSink | ConsoleSink


class Telemetry(AbstractContextManager["Telemetry"]):
    """Fan out rows to sinks, and own them: a context manager that always closes every one."""

    def __init__(self, sinks: Sequence[Sink]) -> None:
        self.sinks = list(sinks)

    @classmethod
    def open(
        cls, telemetry: TelemetryConfig, run_dir: Path, *, name: str, total_steps: int, config: Mapping[str, Any],
        resume_step: int | None = None,
    ) -> Self:  # fmt: skip
        """Make the sinks a recipe asks for; `config` is the resolved recipe, `resume_step` the checkpoint's, if any.

        Raises TelemetryError: wandb or TensorBoard is asked for and cannot start, or metrics.jsonl is broken.
        """
        rows = JsonlSink(run_dir, resume_step)
        opened = cls([rows])
        with ExitStack() as undo:
            undo.push(opened)  # a sink that cannot start closes the others
            if telemetry.tensorboard:
                opened.sinks.append(TensorboardSink(run_dir, telemetry, resume_step))
            if telemetry.wandb != "off":
                opened.sinks.append(WandbSink(run_dir, telemetry, name=name, config=config, started=rows.started))
            if telemetry.console:
                opened.sinks.append(ConsoleSink(total_steps, start_step=max(0, resume_step or 0)))
            undo.pop_all()
        return opened

    def log(self, step: int, metrics: Metrics) -> None:
        """Hand one row to every sink. TelemetryError: unknown name, or warm-start and training names mixed."""
        if len({check_name(name).pattern.startswith("sft/") for name in metrics}) > 1:
            problem = "one row mixes warm-start and training metrics, whose steps count different things"
            raise TelemetryError(problem, key="metrics", value=sorted(metrics), fix="log sft/* in rows of their own")
        for sink in self.sinks:
            sink.log(step, metrics)

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Close all sinks, the others too when one fails; the failure is raised afterwards."""
        with ExitStack() as stack:
            for sink in self.sinks:
                stack.callback(sink.close, failed=kind is not None)
