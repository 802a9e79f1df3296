"""Where metrics go: one `Telemetry` checks every name and hands each row to its sinks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Protocol, Self

from rlkit.config.schema import TelemetryConfig
from rlkit.telemetry.console import ConsoleSink
from rlkit.telemetry.jsonl import JsonlSink
from rlkit.telemetry.names import MetricError, Metrics, check_name
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
    ) -> Self:
        """Make the sinks a recipe asks for.

        Args:
            total_steps: steps of the whole run, for the progress bar.
            config: the resolved recipe as plain containers, for wandb.
            resume_step: step of the checkpoint the run goes on from: later rows are removed. None for a new run.

        Raises MetricError: wandb is asked for and cannot be started, or metrics.jsonl is broken.
        """
        with ExitStack() as undo:
            sinks: list[Sink] = [JsonlSink(run_dir, resume_step)]
            undo.callback(sinks[0].close)
            if telemetry.wandb != "off":
                project, mode = telemetry.wandb_project, telemetry.wandb
                sinks.append(WandbSink(run_dir, project=project, name=name, mode=mode, config=config))
            if telemetry.console:
                sinks.append(ConsoleSink(total_steps, start_step=resume_step or 0))
            undo.pop_all()
        return cls(sinks)

    def log(self, step: int, metrics: Metrics) -> None:
        """Hand one row to every sink. MetricError: unknown name, or warm-start and training names mixed."""
        if len({check_name(name).group == "sft" for name in metrics}) > 1:
            problem = "one row mixes warm-start and training metrics, whose steps count different things"
            raise MetricError(problem, key="metrics", value=sorted(metrics), fix="log sft/* in rows of their own")
        for sink in self.sinks:
            sink.log(step, metrics)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Close all sinks, the others too when one fails; the failure is raised afterwards."""
        with ExitStack() as stack:
            for sink in self.sinks:
                stack.callback(sink.close, failed=kind is not None)
