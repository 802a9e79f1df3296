"""A run folder read back: metrics, recipe, environment, evaluations before and after."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any

import yaml

from rlkit.telemetry.jsonl import Row, read_metrics
from rlkit.telemetry.names import EVAL_NAME, TelemetryError, is_warm_start


@dataclass(frozen=True, slots=True)
class Point:
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


@dataclass(frozen=True)
class EvalCurve:
    """One statistic of one held-out set over the run; `label` is avg@k, pass@k or maj@k."""

    set: str
    label: str
    points: Sequence[Point]

    @property
    def before(self) -> Point | None:
        """The evaluation before the first step, if there was one."""
        return self.points[0] if self.points[0].step == 0 else None

    @property
    def after(self) -> Point | None:
        """The last evaluation after any training, if there was one."""
        return self.points[-1] if self.points[-1].step > 0 else None

    @property
    def change(self) -> Point | None:
        """after - before, None unless both exist. The error takes them as independent: too large."""
        if self.before is None or self.after is None:
            return None
        a, b = self.before.error, self.after.error
        error = None if a is None or b is None else (a**2 + b**2) ** 0.5
        return Point(self.after.step, self.after.value - self.before.value, error)

    def figures(self) -> dict[str, float | None]:
        """`avg@4_before`, `avg@4_before_se`, `avg@4_after`, `avg@4_after_se` and `avg@4_after_step`."""
        out: dict[str, float | None] = {f"{self.label}_after_step": None if self.after is None else self.after.step}
        for when, point in (("before", self.before), ("after", self.after)):
            out[f"{self.label}_{when}"] = None if point is None else point.value
            out[f"{self.label}_{when}_se"] = None if point is None else point.error
        return out


@dataclass(frozen=True)
class RunRecord:
    """What a run folder holds; `config` is empty where the file is missing."""

    run_dir: Path
    rows: Sequence[Row]
    config: Mapping[str, Any]

    @cached_property
    def training(self) -> list[Row]:
        """Rows whose step is the learner's."""
        return [row for row in self.rows if not is_warm_start(row.metrics)]

    @cached_property
    def last_step(self) -> int:
        """The last step that trained (one that was only evaluated does not count); 0 for none."""
        trained = (r.step for r in self.training if any(not n.startswith(("eval/", "time/eval")) for n in r.metrics))
        return max(trained, default=0)

    @property
    def name(self) -> str:
        """The recipe's name, or the folder's."""
        return str(self.config.get("name", self.run_dir.resolve().name))

    @property
    def seconds(self) -> float:
        """Run time in all processes of the run."""
        return max((row.seconds for row in self.rows), default=0.0)

    def metric(self, name: str) -> tuple[list[int], list[float]]:
        """Steps and finite values of a metric, by step; the last row of a step counts."""
        values = {row.step: row.metrics[name] for row in self.rows if name in row.metrics}
        finite = {step: value for step, value in sorted(values.items()) if value is not None}
        return list(finite), list(finite.values())

    @cached_property
    def evaluations(self) -> list[EvalCurve]:
        """Curves of all held-out sets: sets in the recipe's order, avg, pass, maj, k descending."""
        listed = [*((self.config.get("data") or {}).get("eval") or {})]
        curves = {}
        for name in {name for row in self.training for name in row.metrics}:
            if match := EVAL_NAME.fullmatch(name):
                errors = dict(zip(*self.metric(name + "_se"), strict=True))
                points = [Point(s, v, errors.get(s)) for s, v in zip(*self.metric(name), strict=True)]
                place = listed.index(match[1]) if match[1] in listed else len(listed)
                order = (place, match[1], ("avg", "pass", "maj").index(match[3]), -int(match[4]))
                curves[order] = EvalCurve(match[1], match[2], points)
        return [curve for _, curve in sorted(curves.items()) if curve.points]

    @cached_property
    def averages(self) -> list[EvalCurve]:
        """The avg@k curve of every held-out set, with the largest k where there are several."""
        curves = [curve for curve in self.evaluations if curve.label.startswith("avg")]
        return [next(of_one_set) for _, of_one_set in groupby(curves, key=lambda curve: curve.set)]

    @cached_property
    def pauses(self) -> list[tuple[int, float]]:
        """(first step after it, seconds) of every gap in which the run did not run."""
        gaps = [(b.step, (b.time - a.time) - (b.seconds - a.seconds)) for a, b in pairwise(self.rows)]
        return [(step, gap) for step, gap in gaps if gap > 3.0]


def read_mapping(path: Path) -> dict[str, Any]:
    """A YAML or JSON file of a run folder; empty where it is missing. Raises TelemetryError: it is not a mapping."""
    if not path.exists():
        return {}
    try:
        text = path.read_text("utf-8")
        return dict(json.loads(text) if path.suffix == ".json" else yaml.safe_load(text))
    except (yaml.YAMLError, ValueError, TypeError, RecursionError) as error:
        raise TelemetryError(f"not a readable mapping: {error}", key=path.name, value=path.parent.name) from error


def load_run(run_dir: Path) -> RunRecord:
    """Read a run folder. Raises TelemetryError: it does not exist, or a file in it is broken."""
    if not run_dir.is_dir():
        expected = "a run folder, outputs/<name>: what `rlkit train` printed"
        raise TelemetryError("no such folder", key="run", value=str(run_dir), expected=expected)
    config = read_mapping(run_dir / "config.yaml")
    kinds = {"seed": int, "steps": int, "data": dict, "model": dict, "algorithm": dict, "evaluation": dict}
    for key, kind in kinds.items():
        if not isinstance(config.get(key), kind | None):
            problem, fix = "not what a run writes there", "restore config.yaml"
            raise TelemetryError(problem, key=f"config.yaml: {key}", value=config[key], expected=kind.__name__, fix=fix)
    return RunRecord(run_dir, read_metrics(run_dir), config)
