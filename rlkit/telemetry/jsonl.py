"""metrics.jsonl: one flat JSON object a line, `{"step": int, "time": unix seconds, "seconds": run time, **metrics}`.

Several lines may carry the same step; of a metric logged twice for a step the later line counts. A torn last line
(the machine died) is left out when reading and removed when the run goes on; one anywhere else is an error.
"""

import logging
import math
import os
import time
from dataclasses import dataclass
from numbers import Real
from pathlib import Path
from typing import Any

import msgspec

from rlkit.telemetry.names import Metrics, TelemetryError, is_warm_start

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Row:
    """One line. `seconds` is run time since the start, summed over resumes."""

    step: int
    time: float
    seconds: float
    metrics: Metrics

    def line(self) -> bytes:
        """The row as a line of the file."""
        record = {"step": self.step, "time": self.time, "seconds": self.seconds, **self.metrics}
        return msgspec.json.encode(record) + b"\n"


def replace_file(path: Path, content: bytes) -> None:
    """Write a file in one rename: a crash leaves it as it was or whole. Its folder is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def read_metrics(run_dir: Path) -> list[Row]:
    """All rows of a run in the order written; empty when there is no metrics.jsonl yet.

    Raises TelemetryError: a line other than a torn last one is broken.
    """
    path = run_dir / "metrics.jsonl"
    lines = path.read_bytes().split(b"\n") if path.exists() else []
    rows = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            record: dict[str, Any] = msgspec.json.decode(line, type=dict[str, int | float | None])
            rows.append(Row(int(record.pop("step")), float(record.pop("time")), float(record.pop("seconds")), record))
        except (msgspec.MsgspecError, KeyError, TypeError) as error:
            if number < len(lines):
                problem = f"line {number} is not a JSON object of numbers with step, time and seconds"
                fix = "remove that line; only a last line may be torn"
                raise TelemetryError(problem, key="metrics file", value=path.name, fix=fix) from error
            logger.warning("%s: last line is torn and is left out", path.name)
    return rows


class JsonlSink:
    """Append rows to run_dir/metrics.jsonl, each flushed, so that a killed run leaves what it knew.

    An existing file's run time goes on. Training rows of steps after `resume_step`, the checkpoint the run goes on
    from, are removed; warm-start rows stay: their steps count something else. Raises TelemetryError: a broken file.
    """

    def __init__(self, run_dir: Path, resume_step: int | None = None) -> None:
        rows = read_metrics(run_dir)
        # what was lost counts as well
        self.started = time.monotonic() - max((row.seconds for row in rows), default=0.0)
        self._warned: set[str] = set()
        last = math.inf if resume_step is None else resume_step
        kept = [row.line() for row in rows if is_warm_start(row.metrics) or row.step <= last]
        replace_file(run_dir / "metrics.jsonl", b"".join(kept))  # a torn line goes too
        self._file = (run_dir / "metrics.jsonl").open("ab")

    def log(self, step: int, metrics: Metrics) -> None:
        """Write one line; a value that is not finite becomes null, and its name is warned once.

        Raises TelemetryError: a value is not a number.
        """
        values: dict[str, float | None] = {}
        for name, value in metrics.items():
            if not isinstance(value, Real | None):
                problem, fix = f"a metric is a number, not {type(value).__name__}", "log float(value)"
                raise TelemetryError(problem, key=name, value=value, fix=f"{fix}, or value.item() for a tensor")
            values[name] = None if value is None or not math.isfinite(value) else float(value)
            if value is not None and values[name] is None and name not in self._warned:
                self._warned.add(name)
                logger.warning("%s is %s at step %d; written as null, said once", name, value, step)
        self._file.write(Row(step, round(time.time(), 3), round(time.monotonic() - self.started, 3), values).line())
        self._file.flush()

    def close(self, *, failed: bool = False) -> None:
        self._file.close()
