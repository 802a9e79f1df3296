"""Where metrics go: one `Telemetry` checks every name and hands each row to its sinks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, Protocol, Self

from rlkit.config.schema import TelemetryConfig
from rlkit.telemetry.console import ConsoleSink
from rlkit.telemetry.jsonl import JsonlSink, Metrics, axis_of
from rlkit.telemetry.rollouts import rollback_rollouts
from rlkit.telemetry.wandb_sink import WandbSink


class Sink(Protocol):
    """Takes rows of metrics until it is closed."""

    def log(self, step: int, metrics: Metrics) -> None:
        """Take one row; names are known to the registry."""

    def close(self, *, failed: bool = False) -> None:
        """Let go of everything; `failed` says that the run ended in an error."""


class Telemetry:
    """Fan out rows to sinks, and own them: a context manager that always closes every one.

    Example:
        with Telemetry.open(config.telemetry, run_dir, name="run", total_steps=600, config={...}) as telemetry:
            telemetry.log(1, {"reward/mean": 0.5})
    """

    def __init__(self, sinks: Sequence[Sink]) -> None:
        self.sinks = tuple(sinks)

    @classmethod
    def open(
        cls,
        telemetry: TelemetryConfig,
        run_dir: Path,
        *,
        name: str,
        total_steps: int,
        config: Mapping[str, Any],
        resume_step: int | None = None,
        sft_steps: int | None = None,
    ) -> Self:
        """Make the sinks a recipe asks for.

        Args:
            total_steps, sft_steps: learner and warm-start steps of the whole run, for the progress bar.
            config: the resolved recipe as plain containers, for wandb.
            resume_step: step of the checkpoint the run goes on from: later rows and rollout files of the
                earlier process are removed. None for a new run.

        Raises MetricError: wandb is asked for and cannot be started, or metrics.jsonl is broken.
        """
        with ExitStack() as undo:
            jsonl = JsonlSink(run_dir / "metrics.jsonl")
            undo.callback(jsonl.close)
            sinks: list[Sink] = [jsonl]
            if resume_step is not None:
                jsonl.rollback(resume_step)
                rollback_rollouts(run_dir, resume_step)
            if telemetry.wandb != "off":
                project, mode = telemetry.wandb_project, telemetry.wandb
                sinks.append(WandbSink(run_dir, project=project, name=name, mode=mode, config=config))
                undo.callback(sinks[-1].close, failed=True)
            if telemetry.console:
                sinks.append(ConsoleSink(total_steps, start_step=resume_step or 0, sft_steps=sft_steps))
            undo.pop_all()
        return cls(sinks)

    def log(self, step: int, metrics: Metrics) -> None:
        """Hand one row to every sink. MetricError: unknown name, or warm-start and training names mixed."""
        axis_of(metrics)
        for sink in self.sinks:
            sink.log(step, metrics)

    def close(self, *, failed: bool = False) -> None:
        """Close all sinks, the others too when one fails; the failure is raised afterwards."""
        with ExitStack() as stack:
            for sink in self.sinks:
                stack.callback(partial(sink.close, failed=failed))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.close(failed=kind is not None)
