"""A run folder read back: metrics, recipe, environment, evaluations before and after."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from rlkit.errors import RlkitError
from rlkit.telemetry.jsonl import Row, read_metrics, series
from rlkit.telemetry.names import LEARNER_STEP

_EVAL = re.compile(r"eval/([^/]+)/(avg|pass|maj)@(\d+)")
_RANK = {"avg": 0, "pass": 1, "maj": 2}


class RunError(RlkitError):
    """A run folder cannot be read."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """A held-out figure at a learner step; `error` is its standard error, when it was logged."""

    step: int
    value: float
    error: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalCurve:
    """One statistic ("avg", "pass", "maj") at k of one held-out set over the run."""

    set: str
    statistic: str
    k: int
    points: tuple[Point, ...]

    @property
    def label(self) -> str:
        """For example "avg@4"."""
        return f"{self.statistic}@{self.k}"

    @property
    def before(self) -> Point | None:
        """The evaluation before the first step, if there was one."""
        return self.points[0] if self.points and self.points[0].step == 0 else None

    @property
    def after(self) -> Point | None:
        """The last evaluation after any training, if there was one."""
        return self.points[-1] if self.points and self.points[-1].step > 0 else None

    @property
    def change(self) -> Point | None:
        """after - before, None unless both exist. The error takes them as independent: too large."""
        if self.before is None or self.after is None:
            return None
        a, b = self.before.error, self.after.error
        error = None if a is None or b is None else (a**2 + b**2) ** 0.5
        return Point(step=self.after.step, value=self.after.value - self.before.value, error=error)


@dataclass(frozen=True)
class RunRecord:
    """What a run folder holds. `config` and `environment` are None where the file is missing."""

    run_dir: Path
    rows: Sequence[Row]
    config: Mapping[str, Any] | None
    config_text: str | None
    environment: Mapping[str, Any] | None

    @cached_property
    def training(self) -> list[Row]:
        """Rows whose step is the learner's."""
        return [row for row in self.rows if row.axis == LEARNER_STEP]

    @cached_property
    def last_step(self) -> int:
        """The last step that trained (one that was only evaluated does not count); 0 for none."""
        trained = (r.step for r in self.training if any(not n.startswith(("eval/", "time/eval")) for n in r.metrics))
        return max(trained, default=0)

    @property
    def name(self) -> str:
        """The recipe's name, or the folder's."""
        return str((self.config or {}).get("name", self.run_dir.resolve().name))

    @property
    def planned_steps(self) -> int | None:
        """Steps the recipe asks for."""
        steps = (self.config or {}).get("steps")
        return int(steps) if isinstance(steps, int) else None

    @property
    def seconds(self) -> float:
        """Run time in all processes of the run."""
        return max((row.seconds for row in self.rows), default=0.0)

    def metric(self, name: str) -> tuple[list[int], list[float]]:
        """Steps and finite values of a metric."""
        return series(self.rows, name)

    @cached_property
    def evaluations(self) -> list[EvalCurve]:
        """Curves of all held-out sets: sets in the recipe's order, avg, pass, maj, k descending."""
        matches = {name: _EVAL.fullmatch(name) for row in self.training for name in row.metrics}
        curves = []
        for name, match in matches.items():
            if match is None:
                continue
            errors = dict(zip(*self.metric(name + "_se"), strict=True))
            pairs = zip(*self.metric(name), strict=True)
            points = tuple(Point(step=step, value=value, error=errors.get(step)) for step, value in pairs)
            if points:
                curves.append(EvalCurve(set=match[1], statistic=match[2], k=int(match[3]), points=points))
        listed = list(((self.config or {}).get("data") or {}).get("eval") or {})
        order = {name: i for i, name in enumerate(listed)}
        return sorted(curves, key=lambda c: (order.get(c.set, len(order)), c.set, _RANK[c.statistic], -c.k))

    @cached_property
    def averages(self) -> list[EvalCurve]:
        """The avg@k curve of every held-out set, with the largest k where there are several."""
        first: dict[str, EvalCurve] = {}
        for curve in self.evaluations:
            if curve.statistic == "avg":
                first.setdefault(curve.set, curve)
        return list(first.values())

    @cached_property
    def pauses(self) -> list[tuple[int, float]]:
        """(first step after it, seconds) of every gap in which the run did not run."""
        pairs = zip(self.rows, self.rows[1:], strict=False)
        gaps = [(b.step, (b.time - a.time) - (b.seconds - a.seconds)) for a, b in pairs]
        return [(step, gap) for step, gap in gaps if gap > 3.0]


def read_config(run_dir: Path) -> tuple[Mapping[str, Any] | None, str | None]:
    """The recipe in config.yaml as plain containers, and its text; (None, None) where it is missing.

    Raises RunError: the file is not a YAML mapping.
    """
    path = run_dir / "config.yaml"
    if not path.exists():
        return None, None
    text = path.read_text()
    try:
        config = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise RunError(f"config.yaml is not readable: {error}", key="run", value=run_dir.name) from error
    if not isinstance(config, dict):
        raise RunError("config.yaml is not a mapping", key="run", value=run_dir.name)
    return config, text


def load_run(run_dir: Path) -> RunRecord:
    """Read a run folder; files that are missing are None or empty.

    Raises:
        RunError: the folder does not exist, or config.yaml or environment.json is not readable.
        MetricError: metrics.jsonl is broken.
    """
    if not run_dir.is_dir():
        expected = "a run folder, outputs/<name>: what `rlkit train` printed"
        raise RunError("no such folder", key="run", value=str(run_dir), expected=expected)
    config, config_text = read_config(run_dir)
    path = run_dir / "environment.json"
    try:
        environment = json.loads(path.read_text()) if path.exists() else None
    except ValueError as error:
        raise RunError(f"environment.json is not readable: {error}", key="run", value=run_dir.name) from error
    return RunRecord(run_dir, read_metrics(run_dir), config, config_text, environment)
