"""A run folder read back: metrics, recipe, environment, evaluations before and after.

Several lines of metrics.jsonl may carry the same step; of a metric logged twice for a step the later line counts. A
torn last line (the machine died) is left out when reading and removed when the run goes on.
"""

import logging
import os
from collections.abc import Sequence
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from rlkit.telemetry.names import EVAL_NAME, Metrics, TelemetryError, is_warm_start

logger = logging.getLogger(__name__)


class Row(NamedTuple):
    """One line. `seconds` is run time since the start, summed over resumes."""

    step: int
    time: float
    seconds: float
    metrics: Metrics

    def line(self) -> bytes:
        """The row as a line of the file."""
        record = {"step": self.step, "time": self.time, "seconds": self.seconds, **self.metrics}
        return msgspec.json.encode(record) + b"\n"


class Point(NamedTuple):
    """A held-out figure at a learner step; `error` is its standard error, when it was logged."""

    step: int
    value: float
    error: float | None

    @property
    def sure(self) -> bool:
        """Of a change: whether it is more than two standard errors."""
        return self.error is not None and abs(self.value) > 2 * self.error


def with_error(point: Point | None, sign: str = "") -> str:
    """A figure with its standard error, "0.412 +- 0.013"; "-" for None. `sign`: "+" to show it always."""
    if point is None:
        return "-"
    return f"{point.value:{sign}.3f}" + ("" if point.error is None else f" +- {point.error:.3f}")


class EvalCurve:
    """One statistic of one held-out set over the run; `label` is avg@k, pass@k, maj@k or logprob@k.

    `before` any step, `after` the last evaluated one, `change` with the error of two independent figures: too large.
    """

    def __init__(self, set: str, label: str, points: Sequence[Point]) -> None:
        self.set, self.label, self.points = set, label, points
        self.before = points[0] if points[0].step == 0 else None
        self.after = points[-1] if points[-1].step > 0 else None
        self.change = None
        if self.before is not None and self.after is not None:
            a, b = self.before.error, self.after.error
            error = None if a is None or b is None else (a**2 + b**2) ** 0.5
            self.change = Point(self.after.step, self.after.value - self.before.value, error)

    def figures(self) -> dict[str, float | None]:
        """`avg@4_before`, `avg@4_before_se`, `avg@4_after`, `avg@4_after_se` and `avg@4_after_step`."""
        out: dict[str, float | None] = {f"{self.label}_after_step": self.after.step if self.after else None}
        for when, point in (("before", self.before), ("after", self.after)):
            value, error = (point.value, point.error) if point else (None, None)
            out |= {f"{self.label}_{when}": value, f"{self.label}_{when}_se": error}
        return out


class RunRecord:
    """What a run folder holds. Raises TelemetryError: it does not exist, or a file in it is broken.

    `config` is empty where the file is missing; `training` has the rows whose step is the learner's, `last_step` is the
    last that trained (0 for none), `pauses` are (first step after it, seconds) of gaps in which nothing ran.
    `evaluations` are the curves of all held-out sets: sets in the recipe's order, avg, pass, maj, logprob, k
    descending; `averages` those of avg@k, or else logprob@k, of each set's largest k.
    """

    def __init__(self, run_dir: Path) -> None:
        if not run_dir.is_dir():
            expected = "a run folder, outputs/<name>: what `rlkit train` printed"
            raise TelemetryError("no such folder", key="run", value=str(run_dir), expected=expected)
        self.run_dir, self.config = run_dir, read_mapping(run_dir / "config.yaml")
        self.rows = rows = read_metrics(run_dir)
        self.name = str(self.config.get("name", run_dir.resolve().name))
        self.seconds = max((row.seconds for row in rows), default=0.0)
        self.training = [row for row in rows if not is_warm_start(row.metrics)]
        trained = (r.step for r in self.training if any(not n.startswith(("eval/", "time/eval")) for n in r.metrics))
        self.last_step = max(trained, default=0)
        gaps = [(b.step, (b.time - a.time) - (b.seconds - a.seconds)) for a, b in pairwise(rows)]
        self.pauses = [(step, gap) for step, gap in gaps if gap > 3.0]
        listed = [*((self.config.get("data") or {}).get("eval") or {})]
        curves = {}
        for name in {name for row in self.training for name in row.metrics}:
            if match := EVAL_NAME.fullmatch(name):
                errors = dict(zip(*self.metric(name + "_se"), strict=True))
                points = [Point(s, v, errors.get(s)) for s, v in zip(*self.metric(name), strict=True)]
                place = listed.index(match[1]) if match[1] in listed else len(listed)
                order = (place, match[1], ("avg", "pass", "maj", "logprob").index(match[3]), -int(match[4]))
                if points:
                    curves[order] = EvalCurve(match[1], match[2], points)
        self.evaluations = [curve for _, curve in sorted(curves.items())]
        averages = [curve for curve in self.evaluations if curve.label.startswith(("avg", "logprob"))]
        self.averages = [next(of_one_set) for _, of_one_set in groupby(averages, key=lambda curve: curve.set)]

    def metric(self, name: str) -> tuple[list[int], list[float]]:
        """Steps and finite values of a metric, by step; the last row of a step counts."""
        values = {row.step: row.metrics[name] for row in self.rows if name in row.metrics}
        finite = {step: value for step, value in sorted(values.items()) if value is not None}
        return list(finite), list(finite.values())


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
    """All rows of a run as written, none without a file; TelemetryError: a line but a torn last one is broken."""
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


def read_mapping(path: Path) -> dict[str, Any]:
    """A YAML or JSON file of a run folder; empty where it is missing. Raises TelemetryError: it is not a mapping."""
    if not path.exists():
        return {}
    try:
        language = msgspec.json if path.suffix == ".json" else msgspec.yaml
        return dict(language.decode(path.read_bytes(), type=dict[str, Any]))
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise TelemetryError(f"not a readable mapping: {error}", key=path.name, value=path.parent.name) from error
