"""Rows out of files: .jsonl (an object a line), .json (a list of objects), .parquet."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from rlkit.errors import DataError

Row = Mapping[str, Any]


def _read_jsonl(path: Path) -> list[Row]:
    rows: list[Row] = []
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():  # a blank line holds no row; editors leave one at the end
                continue
            place = f"{path}, line {number}"
            rows.append(_row(_parse(line, place), place))
    return rows


def _read_json(path: Path) -> list[Row]:
    items = _parse(path.read_bytes(), str(path))
    if not isinstance(items, list):
        raise DataError(
            f"{path}: not a list of objects but {_kind(items)}",
            expected="[{...}, {...}] (or a .jsonl file with an object a line)",
        )
    return [_row(item, f"{path}, item {number}") for number, item in enumerate(items)]


def _read_parquet(path: Path) -> list[Row]:
    import pyarrow
    import pyarrow.parquet

    try:
        rows: list[Row] = pyarrow.parquet.read_table(path).to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path}: not a readable Parquet file: {error}") from error
    return rows


def _parse(data: bytes, place: str) -> Any:
    try:
        return json.loads(data.decode("utf-8-sig"), parse_constant=_no_constant)
    except UnicodeDecodeError as error:
        raise DataError(f"{place}: not UTF-8: {error}", expected="UTF-8 text") from error
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}" if error.lineno > 1 else (f"column {error.colno}")
        raise DataError(f"{place}: malformed JSON at {where}: {error.msg}") from error
    except _NotJson as error:
        raise DataError(f"{place}: malformed JSON: {error} is no JSON value; use null") from error


class _NotJson(ValueError):
    pass


def _no_constant(name: str) -> Any:
    raise _NotJson(name)


def _row(value: Any, place: str) -> Row:
    if not isinstance(value, dict):
        raise DataError(f"{place}: a row is {_kind(value)}", expected='an object, {"field": ...}')
    return value


def _kind(value: Any) -> str:
    return {list: "a list", dict: "an object", str: "a text", type(None): "null"}.get(
        type(value), f"a {type(value).__name__}"
    )


READERS: dict[str, Callable[[Path], list[Row]]] = {
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".parquet": _read_parquet,
}
