"""metrics.jsonl: one flat JSON object a line, written, rolled back and read here.

A line is `{"step": int, "time": unix seconds, "seconds": run time, **metrics}`. Several lines may
carry the same step (training, then evaluation); of a metric logged twice for a step the later line
counts. A torn last line (the machine died while writing) is left out when reading and removed when
the run goes on; a broken line anywhere else is an error.
"""

from __future__ import annotations

import json
import logging
import math
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from pathlib import Path
from typing import Any, TypeAlias

from rlkit.telemetry.names import LEARNER_STEP, MetricError, check_name

logger = logging.getLogger(__name__)

Metrics: TypeAlias = Mapping[str, float | None]
KEYS = ("step", "time", "seconds")


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One line. `seconds` is run time since the start, summed over resumes."""

    step: int
    time: float
    seconds: float
    metrics: dict[str, float | None]

    @property
    def axis(self) -> str:
        """What `step` counts: LEARNER_STEP or SFT_STEP (a line never mixes them)."""
        return axis_of(self.metrics)


def axis_of(metrics: Metrics) -> str:
    """The axis the metrics share. Raises MetricError: a name is unknown, or names of both axes are mixed."""
    axes = {check_name(name).axis for name in metrics}
    if len(axes) > 1:
        problem = "one row mixes warm-start and training metrics, whose steps count different things"
        raise MetricError(problem, key="metrics", value=sorted(metrics), fix="log sft/* in rows of their own")
    return axes.pop() if axes else LEARNER_STEP


def _parse(line: bytes) -> dict[str, Any] | None:
    """The object of a line, or None where it is not one of ours."""
    try:
        record = json.loads(line)
    except ValueError:  # JSONDecodeError and UnicodeDecodeError
        return None
    whole = isinstance(record, dict) and all(isinstance(record.get(k), (int, float)) for k in KEYS)
    return record if whole else None


def _lines(path: Path) -> list[tuple[bytes, dict[str, Any]]]:
    """Every whole line with its object; a torn last line is left out."""
    raw = path.read_bytes().split(b"\n")
    kept: list[tuple[bytes, dict[str, Any]]] = []
    last = max((i for i, line in enumerate(raw) if line.strip()), default=-1)
    for number, line in enumerate(raw[: last + 1]):
        record = _parse(line)
        if record is not None:
            kept.append((line, record))
        elif number == last and last == len(raw) - 1:
            logger.warning("%s: last line is torn and is left out", path.name)
        else:
            problem = f"line {number + 1} is not a JSON object with step, time and seconds"
            fix = "remove that line; only a last line may be torn"
            raise MetricError(problem, key="metrics file", value=path.name, fix=fix)
    return kept


def read_metrics(run_dir: Path) -> list[Row]:
    """All rows of a run in the order written; empty when there is no metrics.jsonl yet.

    Raises MetricError: a line other than a torn last one is broken.
    """
    path = run_dir / "metrics.jsonl"
    return [
        Row(
            step=int(record["step"]),
            time=float(record["time"]),
            seconds=float(record["seconds"]),
            metrics={k: v for k, v in record.items() if k not in KEYS},
        )
        for _, record in (_lines(path) if path.exists() else [])
    ]


def series(rows: Sequence[Row], name: str) -> tuple[list[int], list[float]]:
    """Steps and finite values of one metric, by step; the last row of a step counts."""
    values = {row.step: row.metrics[name] for row in rows if name in row.metrics}
    finite = [(step, value) for step, value in sorted(values.items()) if value is not None]
    return [step for step, _ in finite], [float(value) for _, value in finite]


class JsonlSink:
    """Append rows to `path`, each flushed, so that a killed run leaves what it knew.

    Opening an existing file goes on with its run time; a torn last line is removed. Raises MetricError
    for a value that is not a number (log) and for a broken line in the middle (open).
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._warned: set[str] = set()
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = _lines(path) if path.exists() else []
        self._before = max((float(record["seconds"]) for _, record in kept), default=0.0)
        self._started = time.monotonic()
        self._rewrite([line for line, _ in kept])
        self._file = path.open("ab")

    @property
    def seconds(self) -> float:
        """Run time until now: this process's, and that of the runs it goes on from."""
        return self._before + time.monotonic() - self._started

    def log(self, step: int, metrics: Metrics) -> None:
        """Write one line; a value that is not finite becomes null, and its name is warned once."""
        record: dict[str, Any] = {"step": step, "time": round(time.time(), 3), "seconds": round(self.seconds, 3)}
        record |= {name: self._number(step, name, value) for name, value in metrics.items()}
        self._file.write(json.dumps(record, allow_nan=False).encode() + b"\n")
        self._file.flush()

    def _number(self, step: int, name: str, value: object) -> float | int | None:
        if value is None:
            return None
        if not isinstance(value, Real):
            problem = f"a metric is a number, not {type(value).__name__}"
            raise MetricError(problem, key=name, value=value, fix="log float(value), or value.item() for a tensor")
        number = float(value)
        if math.isfinite(number):
            return int(number) if isinstance(value, int) else number
        if name not in self._warned:
            self._warned.add(name)
            logger.warning("%s is %s at step %d; written as null, said once", name, number, step)
        return None

    def rollback(self, step: int) -> int:
        """Remove training rows of later steps than `step`, from whose checkpoint a run resumes; return how many.

        That step's own rows, its evaluation among them, stay, and so do warm-start rows, whose steps count
        something else. The run time of what was lost stays counted.
        """

        def later(record: Mapping[str, Any]) -> bool:
            names = [name for name in record if name not in KEYS]
            warm_start = bool(names) and all(name.startswith("sft/") for name in names)
            return not warm_start and record["step"] > step

        kept = _lines(self.path)
        keep = [line for line, record in kept if not later(record)]
        self._file.close()
        self._rewrite(keep)
        self._file = self.path.open("ab")
        return len(kept) - len(keep)

    def _rewrite(self, lines: Sequence[bytes]) -> None:
        """Replace the file in one rename, so that no crash can lose it."""
        temporary = self.path.with_name(self.path.name + ".tmp")
        with temporary.open("wb") as file:
            file.writelines(line + b"\n" for line in lines)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(self.path)

    def close(self, *, failed: bool = False) -> None:
        """Close the file; closing twice is harmless."""
        self._file.close()
