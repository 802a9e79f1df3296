"""Where rows come from: a file, the Hugging Face hub, or a procedural task.

A source is a component with one method, `rows()`. A row is a mapping of field names to values; its
number (counted from 0) is its default id.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from rlkit.config.components import build
from rlkit.data.files import READERS, Row
from rlkit.errors import DataError, nearest


class Source(Protocol):
    """Anything with `rows()`; plug-ins need no more."""

    def rows(self) -> Sequence[Row]:
        """All rows, in an order that is the same at every call."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalFile:
    """Rows of a .jsonl (an object a line), .json (a list of objects) or .parquet file.

    Attributes:
        path: relative to the working directory; `~` is expanded.
        columns: keep only these fields (the rest never reaches the buffer); default: all.

    Raises `DataError` naming the line (or item) that is malformed.
    """

    path: str
    columns: tuple[str, ...] | None = None

    def rows(self) -> Sequence[Row]:
        path = Path(self.path).expanduser()
        reader = READERS.get(path.suffix)
        if reader is None:
            raise DataError(
                f"unknown kind of file {path.suffix!r}",
                key="path",
                value=self.path,
                expected=f"a name that ends in {', '.join(READERS)}",
            )
        if not path.is_file():
            siblings = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
            raise DataError(
                f"no such file.{nearest(path.name, siblings)}",
                key="path",
                value=self.path,
                expected=f"a file; relative paths start at {Path.cwd()}",
            )
        return _select(reader(path), self.columns, self.path)


@dataclass(frozen=True, slots=True, kw_only=True)
class HubDataset:
    """Rows of a data set on the Hugging Face hub, or in its local cache, by `datasets`.

    Example:
        HubDataset(name="openai/gsm8k", subset="main", split="train")

    Attributes:
        name: hub name or folder; subset: its configuration; split: e.g. "train" or "train[:100]".
        revision: commit, tag or branch; give a commit to make a run repeatable.
        columns: keep only these fields; default: all.
    """

    name: str
    subset: str | None = None
    split: str = "train"
    revision: str | None = None
    columns: tuple[str, ...] | None = None

    def rows(self) -> Sequence[Row]:
        try:
            from datasets import load_dataset
        except ImportError as error:
            raise DataError(
                "the `datasets` library is not installed",
                key="name",
                value=self.name,
                fix="pip install datasets, or use rlkit.data.sources.LocalFile",
            ) from error
        try:
            table = load_dataset(self.name, self.subset, split=self.split, revision=self.revision)
        # Every kind of error (network, cache, schema, split) comes out of this one call.
        except Exception as error:
            raise DataError(
                f"cannot be loaded ({type(error).__name__}: {error})",
                key="name",
                value=self.name,
                expected=f"a data set with subset {self.subset!r} and split {self.split!r}, "
                "reachable or already in the local cache",
                fix="download it once where there is a network, or use rlkit.data.sources.LocalFile on a file of rows",
            ) from error
        if self.columns is not None:
            _check_columns(self.columns, table.column_names, self.name)
            table = table.select_columns(list(self.columns))
        rows: list[Row] = table.to_list()
        return rows


@dataclass(frozen=True, slots=True, kw_only=True)
class ReasoningGym:
    """Rows of a reasoning-gym task, made on the fly: `question`, `answer`, `metadata`.

    reasoning-gym seeds row i with `seed + i`: two sets whose ranges [seed, seed + size) overlap
    share rows, and small tasks repeat questions under any seed. `exclude` keeps a training set
    clear of a held-out one whatever the seeds; further rows are drawn until `size` is reached.

    Attributes:
        task: name of the task, e.g. "chain_sum".
        size: number of rows. seed: of the first row.
        settings: the task's own settings, e.g. {"min_terms": 2, "max_terms": 4}.
        distinct: no question twice.
        exclude: sources (components) whose questions must not appear, e.g. in YAML
            `exclude: ["${data.eval.heldout.source}"]`.

    Raises `DataError` on an unknown task or setting, or when `size` rows cannot be found.
    """

    task: str
    size: int
    seed: int = 0
    settings: dict[str, Any] = field(default_factory=dict)
    distinct: bool = False
    exclude: tuple[Any, ...] = ()

    def rows(self) -> Sequence[Row]:
        if self.size < 1:
            raise DataError("no rows asked for", key="size", value=self.size, expected="1 or more")
        if not self.distinct and not self.exclude:
            dataset = self._dataset(self.size)
            return [dataset[index] for index in range(self.size)]
        return self._filtered()

    def _filtered(self) -> list[Row]:
        refused = {
            str(row["question"])
            for number, item in enumerate(self.exclude)
            for row in as_source(item, f"exclude[{number}]").rows()
        }
        # A task with too few questions would be drawn from for ever.
        attempts = 20 * self.size + 1000
        dataset = self._dataset(attempts)
        kept: list[Row] = []
        for index in range(attempts):
            row = dataset[index]
            if row["question"] not in refused:
                kept.append(row)
                if self.distinct:
                    refused.add(row["question"])
                if len(kept) == self.size:
                    return kept
        raise DataError(
            f"only {len(kept)} rows of {self.task!r} found in {attempts} draws "
            f"(distinct={self.distinct}, {len(self.exclude)} excluded sources)",
            key="size",
            value=self.size,
            expected=f"at most {len(kept)}",
            fix="lower size, or widen the task's settings",
        )

    def _dataset(self, size: int) -> Any:
        try:
            import reasoning_gym
            from reasoning_gym.factory import DATASETS
        except ImportError as error:
            raise DataError(
                "the `reasoning_gym` library is not installed",
                key="task",
                value=self.task,
                fix="pip install reasoning-gym",
            ) from error
        if self.task not in DATASETS:
            raise DataError(f"no such reasoning-gym task.{nearest(self.task, DATASETS)}", key="task", value=self.task)
        try:
            return reasoning_gym.create_dataset(self.task, seed=self.seed, size=size, **self.settings)
        # Each task checks its settings by assert, ValueError or TypeError, as it likes.
        except (AssertionError, TypeError, ValueError) as error:
            known = sorted(DATASETS[self.task][1].__dataclass_fields__)
            raise DataError(
                f"{self.task} refuses them: {error}",
                key="settings",
                value=self.settings,
                expected=f"settings among {', '.join(known)}",
            ) from error


def as_source(component: Any, key: str) -> Source:
    """Build a source from its component; `DataError` when it has no `rows()`."""
    source = component if hasattr(component, "rows") else build(component, key=key)
    if not callable(getattr(source, "rows", None)):
        raise DataError(
            "this component has no method rows()",
            key=key,
            value=component,
            expected="a data source, e.g. rlkit.data.sources.LocalFile",
        )
    return source  # type: ignore[no-any-return]


def _select(rows: list[Row], columns: tuple[str, ...] | None, name: str) -> list[Row]:
    if columns is None:
        return rows
    for row in rows:
        _check_columns(columns, row, name)
    return [{column: row[column] for column in columns} for row in rows]


def _check_columns(columns: tuple[str, ...], present: Sequence[str] | Row, name: str) -> None:
    for column in columns:
        if column not in present:
            raise DataError(
                f"{name} has no field {column!r}.{nearest(column, present)}",
                key="columns",
                value=columns,
                expected=f"fields among {', '.join(present)}",
            )
