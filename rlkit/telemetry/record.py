"""A run folder read back: metrics, recipe, environment, evaluations before and after."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from rlkit.telemetry.jsonl import Row, read_metrics, series
from rlkit.telemetry.names import LEARNER_STEP
from rlkit.telemetry.recipe import RunError, read_config
from rlkit.telemetry.rollouts import rollout_steps

_EVAL = re.compile(r"eval/([^/]+)/((?:avg|pass|maj)@(\d+))")


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
        """after - before. Its error takes the two as independent: too large, as prompts are shared.

        None unless both exist.
        """
        if self.before is None or self.after is None:
            return None
        errors = (self.before.error, self.after.error)
        error = None
        if errors[0] is not None and errors[1] is not None:
            error = (errors[0] ** 2 + errors[1] ** 2) ** 0.5
        value = self.after.value - self.before.value
        return Point(step=self.after.step, value=value, error=error)


@dataclass(frozen=True)
class RunRecord:
    """What a run folder holds. `config` and `environment` are None where the file is missing."""

    run_dir: Path
    rows: Sequence[Row]
    config: Mapping[str, Any] | None
    config_text: str | None
    environment: Mapping[str, Any] | None
    rollout_steps: Sequence[int]

    @cached_property
    def training(self) -> list[Row]:
        """Rows whose step is the learner's."""
        return [row for row in self.rows if row.axis == LEARNER_STEP]

    @cached_property
    def trained_steps(self) -> list[int]:
        """Steps that trained, ascending (a step that was only evaluated is not one)."""
        trained = {
            row.step
            for row in self.training
            if any(not name.startswith("eval/") and name != "time/eval" for name in row.metrics)
        }
        return sorted(trained)

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
        names = {name for row in self.training for name in row.metrics if _EVAL.fullmatch(name)}
        curves = []
        for name in names:
            match = _EVAL.fullmatch(name)
            assert match is not None
            steps, values = self.metric(name)
            errors = dict(zip(*self.metric(name + "_se"), strict=True))
            points = tuple(
                Point(step=step, value=value, error=errors.get(step)) for step, value in zip(steps, values, strict=True)
            )
            statistic = match[2].split("@")[0]
            curve = EvalCurve(set=match[1], statistic=statistic, k=int(match[3]), points=points)
            if points:
                curves.append(curve)
        listed = list(((self.config or {}).get("data") or {}).get("eval") or {})
        order = {name: i for i, name in enumerate(listed)}
        rank = {"avg": 0, "pass": 1, "maj": 2}
        curves.sort(key=lambda c: (order.get(c.set, len(order)), c.set, rank[c.statistic], -c.k))
        return curves

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
        out = []
        for earlier, later in zip(self.rows, self.rows[1:], strict=False):
            gap = (later.time - earlier.time) - (later.seconds - earlier.seconds)
            if gap > 3.0:
                out.append((later.step, gap))
        return out


def load_run(run_dir: Path) -> RunRecord:
    """Read a run folder; files that are missing are None or empty.

    Raises:
        RunError: the folder does not exist, or config.yaml or environment.json is not readable.
        MetricError: metrics.jsonl is broken.
    """
    if not run_dir.is_dir():
        raise RunError(
            "no such folder",
            key="run",
            value=str(run_dir),
            expected="a run folder, outputs/<name>",
            fix="give the folder that `rlkit train` printed",
        )
    config, config_text = read_config(run_dir)
    path = run_dir / "environment.json"
    try:
        environment = json.loads(path.read_text()) if path.exists() else None
    except ValueError as error:
        problem = f"environment.json is not readable: {error}"
        raise RunError(problem, key="run", value=run_dir.name) from error
    return RunRecord(
        run_dir=run_dir,
        rows=read_metrics(run_dir),
        config=config,
        config_text=config_text,
        environment=environment,
        rollout_steps=rollout_steps(run_dir),
    )
