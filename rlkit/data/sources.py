"""Where rows come from: a file, the Hugging Face hub, or a procedural task.

A source is a component whose method `rows()` gives all rows, in the same order at every call. A row maps field names to
values; its number is its default id.
"""

import codecs
from collections.abc import Mapping, Sequence
from dataclasses import field
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pyarrow
import pyarrow.parquet

from rlkit.config.components import build
from rlkit.errors import DataError, nearest
from rlkit.settings import Checked

Row = Mapping[str, Any]
SUFFIXES = (".jsonl", ".json", ".parquet")


class LocalFile(Checked, kw_only=True):
    """Rows of a .jsonl (an object a line), .json (a list of objects) or .parquet file. DataError names a bad line."""

    path: str  # `~` is expanded

    def rows(self) -> Sequence[Row]:
        path = Path(self.path).expanduser()
        if path.suffix not in SUFFIXES:
            expected = f"a name that ends in {', '.join(SUFFIXES)}"
            raise DataError(f"unknown kind of file {path.suffix!r}", key="path", value=self.path, expected=expected)
        if not path.is_file():
            near = nearest(path.name, [p.name for p in path.parent.glob("*")])
            expected = f"a file; relative paths start at {Path.cwd()}"
            raise DataError(f"no such file.{near}", key="path", value=self.path, expected=expected)
        return _read(path)


class HubDataset(Checked, kw_only=True):
    """Rows of a data set on the Hugging Face hub or in its local cache. `DataError` out of reach."""

    name: str  # on the hub, or a folder
    subset: str | None = None  # its configuration
    split: str = "train"  # or e.g. "train[:100]"
    revision: str | None = None  # commit, tag or branch; a commit makes a run repeatable

    def rows(self) -> Sequence[Row]:
        from datasets import load_dataset  # here, because it takes a second

        try:
            return list(load_dataset(self.name, self.subset, split=self.split, revision=self.revision).to_list())
        # Every kind of error (network, cache, schema, split) comes out of this one call.
        except Exception as error:
            problem = f"cannot be loaded ({type(error).__name__}: {error})"
            expected = f"subset {self.subset!r} and split {self.split!r}, in reach or in the local cache"
            fix = "download it where there is a network (then HF_HUB_OFFLINE=1), or use rlkit.data.sources.LocalFile"
            raise DataError(problem, key="name", value=self.name, expected=expected, fix=fix) from error


class ReasoningGym(Checked, kw_only=True):
    """Rows of a reasoning-gym task, made on the fly: `question`, `answer`, `metadata`. How sets overlap: docs/data.md.

    `DataError`: unknown task or setting, fewer than `size` rows.
    """

    task: str
    size: int
    seed: int = 0  # row i is seeded with seed + i
    settings: dict[str, Any] = field(default_factory=dict)  # the task's own
    distinct: bool = False  # no question twice
    exclude: tuple[Any, ...] = ()  # sources (components) whose questions must not appear

    def rows(self) -> Sequence[Row]:
        if self.size < 1:
            raise DataError("no rows asked for", key="size", value=self.size, expected="1 or more")
        sources = [as_source(item, f"exclude[{number}]") for number, item in enumerate(self.exclude)]
        refused = {row["question"] for source in sources for row in source.rows()}
        # A task with too few questions would be drawn from for ever.
        draws = 20 * self.size + 1000 if self.distinct or self.exclude else self.size
        dataset, kept = self._dataset(draws), list[Row]()
        for row in (dataset[index] for index in range(draws)):
            if row["question"] not in refused:
                kept.append(row)
                if len(kept) == self.size:
                    return kept
                if self.distinct:
                    refused.add(row["question"])
        problem = f"only {len(kept)} rows of {self.task!r} found in {draws} draws"
        expected, fix = f"at most {len(kept)}", "lower size, or widen the task's settings"
        raise DataError(problem, key="size", value=self.size, expected=expected, fix=fix)

    def _dataset(self, size: int) -> Any:
        import reasoning_gym
        from reasoning_gym.factory import DATASETS

        if self.task not in DATASETS:
            raise DataError(f"no such reasoning-gym task.{nearest(self.task, DATASETS)}", key="task", value=self.task)
        try:
            return reasoning_gym.create_dataset(self.task, seed=self.seed, size=size, **self.settings)
        # Each task checks its settings by assert, ValueError or TypeError, as it likes.
        except (AssertionError, TypeError, ValueError) as error:
            expected = f"settings among {', '.join(sorted(DATASETS[self.task][1].__dataclass_fields__))}"
            problem = f"{self.task} refuses them: {error}"
            raise DataError(problem, key="settings", value=self.settings, expected=expected) from error


class Mixture(Checked, kw_only=True):
    """Rows of several sources (components) in proportion to `weights`: the next is of the one furthest behind.

    `DataError`: weights that do not fit, or a source with fewer rows than its share of `size`.
    """

    sources: tuple[Any, ...]
    weights: tuple[float, ...]
    size: int

    def rows(self) -> Sequence[Row]:
        if len(self.weights) != len(self.sources) or min(self.weights, default=0) <= 0:
            expected = f"{len(self.sources)} numbers above 0, one a source"
            raise DataError("weights do not fit", key="weights", value=self.weights, expected=expected)
        shares = np.array(self.weights) / sum(self.weights)
        every = [iter(as_source(item, f"sources[{number}]").rows()) for number, item in enumerate(self.sources)]
        kept, taken = list[Row](), np.zeros(len(shares))
        while len(kept) < self.size:
            chosen = int(np.argmax(shares * (len(kept) + 1) - taken))
            if (row := next(every[chosen], None)) is None:
                problem = f"source {chosen} has {taken[chosen]:.0f} rows, its share of {self.size} is more"
                fix = "lower size or its weight, or give it more rows"
                raise DataError(problem, key="size", value=self.size, fix=fix)
            kept.append(row)
            taken[chosen] += 1
        return kept


def as_source(component: Any, key: str) -> Any:
    """Build a source from its component; `DataError` when it has no `rows()`."""
    source = build(component, key=key)
    if not callable(getattr(source, "rows", None)):
        expected = "a data source, e.g. rlkit.data.sources.LocalFile"
        raise DataError("this component has no method rows()", key=key, value=component, expected=expected)
    return source


def _read(path: Path) -> list[Row]:
    place = str(path)
    try:
        if path.suffix == ".parquet":
            return list[Row](pyarrow.parquet.read_table(path).to_pylist())
        content = path.read_bytes().removeprefix(codecs.BOM_UTF8)
        if path.suffix == ".json":
            return list[Row](msgspec.json.decode(content, type=list[dict[str, Any]]))
        decoder, rows = msgspec.json.Decoder(dict[str, Any]), list[Row]()
        for number, line in enumerate(content.split(b"\n"), start=1):
            place = f"{path}, line {number}"
            if line.strip():  # a blank line holds no row; editors leave one at the end
                rows.append(decoder.decode(line))
        return rows
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        what = "not UTF-8" if isinstance(error, UnicodeDecodeError) else "not a row of JSON"
        raise DataError(f"{place}: {what}: {error}", expected='objects, {"field": ...}') from error
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{place}: not a readable {path.suffix} file: {error}") from error
