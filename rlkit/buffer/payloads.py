"""Payloads: records as bytes, and the files outside the database that hold the long ones.

Values are msgpack, arrays as raw numbers: integers take 4 bytes where that holds them, else 8, and an array of one
repeated value is stored as that value. What comes back is equal bit for bit, dtypes included. A prompt's metadata holds
JSON values (load_prompts sees to it): tuples come back as lists. A file is a CRC-32 (little-endian) and the record.
"""

import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import numpy as np
from sqlalchemy import Connection, delete, insert, select

from rlkit.buffer.protocol import require
from rlkit.buffer.tables import payloads
from rlkit.errors import BufferError, DatabaseError
from rlkit.types import Rollout

T = TypeVar("T")
_ARRAYS = {"token_ids": np.int64, "behavior_logprobs": np.float32, "loss_mask": np.bool_, "segments": np.int64}


def encode(value: Any, what: str) -> bytes:
    """A Prompt, or a list of Rollout or Verdict, as bytes; BufferError naming `what` if msgpack cannot carry it."""
    try:
        return msgspec.msgpack.encode(value, enc_hook=_pack)
    except (TypeError, OverflowError, UnicodeEncodeError) as error:
        expected = "JSON values: None, bool, 64-bit int, float, str of whole characters, lists and dicts of them"
        raise BufferError(f"cannot be stored: {error}", key=what, expected=expected) from error


def decode(data: bytes, kind: type[T]) -> T:
    """Inverse of `encode`, for kind Prompt, list[Rollout] or list[Verdict]."""
    return msgspec.msgpack.decode(data, type=kind, dec_hook=_unpack)


def check_rollout(x: Rollout) -> None:
    """BufferError unless arrays are of one length and their types, and the spans cover the tokens."""
    who, tokens = f"sample {x.index} of group {x.ordinal}", len(x.token_ids)
    for name, dtype in _ARRAYS.items():
        array = getattr(x, name)
        if not isinstance(array, np.ndarray) or array.dtype != dtype or array.shape != (tokens,):
            found = f"{array.dtype}{array.shape}" if isinstance(array, np.ndarray) else str(type(array))
            problem, expected = f"{who}: {name} has the wrong type or length", f"{np.dtype(dtype)}({tokens},)"
            raise BufferError(problem, key=name, value=found, expected=f"a numpy array, {expected}")
    ends = [0, *(span.end for span in x.version_spans)]
    joined = all(s.start == before and s.start < s.end for before, s in zip(ends, x.version_spans, strict=False))
    problem, value = f"{who}: version spans do not cover its tokens", x.version_spans
    expected = f"non-empty spans that cover [0, {tokens}) without gap or overlap"
    require(joined and ends[-1] == tokens, problem, key="version_spans", value=value, expected=expected)


def _pack(value: Any) -> Any:
    """Arrays as (dtype, length, bytes); numpy scalars in metadata as numbers."""
    if isinstance(value, np.generic):
        return value.item()
    if not isinstance(value, np.ndarray):
        raise TypeError(f"a {type(value).__name__}")
    data, one = value.tobytes(), value[:1].tobytes()
    if data == one * len(value):
        return value.dtype.str, len(value), one
    if value.dtype == np.int64 and ((narrow := value.astype(np.int32)) == value).all():
        return narrow.dtype.str, len(value), narrow.tobytes()
    return value.dtype.str, len(value), data


def _unpack(annotation: Any, packed: Any) -> Any:
    """Inverse of `_pack` for a field annotated NDArray[dtype]; a copy, as torch wants writable memory."""
    stored, length, data = packed
    dtype = annotation.__args__[1].__args__[0]
    raw = np.frombuffer(data, dtype=stored).astype(dtype)
    return raw if len(raw) == length else raw.repeat(length)


class RecordFiles:
    """A file a slice, in one folder (made if missing) that all processes of a node share.

    `place` is a lease, or the row of its slice; lease ids are never used again, so no two workers write one file.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def write(self, connection: Connection, records: Sequence[tuple[Any, bytes]]) -> None:
        """Store the records of places, under the database's write lock; BufferError if the disk is full."""
        for place, record in records:
            path = self._path(place)
            try:
                path.write_bytes(_sealed(record))
            except OSError as error:  # no row refers to the torn bytes
                problem, fix = f"cannot write a payload: {error.strerror}", "free disk space and resume"
                raise BufferError(problem, key="payload", value=str(path), fix=fix) from error

    def read(self, connection: Connection, places: Sequence[Any]) -> list[bytes]:
        """Their records; BufferError naming one that is missing, torn or altered."""
        paths = [self._path(place) for place in places]
        return [_opened(path.read_bytes() if path.exists() else b"", str(path)) for path in paths]

    def delete_below(self, connection: Connection, ordinal: int) -> None:
        """Delete the records of all groups before this one."""
        for path in self._folder.glob("*-*-*"):
            if int(path.name.partition("-")[0]) < ordinal:
                path.unlink(missing_ok=True)

    def _path(self, place: Any) -> Path:
        return self._folder / f"{place.ordinal}-{place.start}-{place.lease_id}"


class RecordRows:
    """The same as rows of the database, where workers on several hosts see no common folder."""

    def write(self, connection: Connection, records: Sequence[tuple[Any, bytes]]) -> None:
        if records:
            rows = [_key(place) | {"record": _sealed(record)} for place, record in records]
            connection.execute(insert(payloads), rows)

    def read(self, connection: Connection, places: Sequence[Any]) -> list[bytes]:
        ids = [place.lease_id for place in places]  # a lease covers one slice
        within = payloads.c.ordinal.in_({place.ordinal for place in places}) & payloads.c.lease_id.in_(ids)
        found = {x.lease_id: x.record for x in connection.execute(select(payloads).where(within))}
        return [_opened(found.get(place.lease_id, b""), f"row {_key(place)}") for place in places]

    def delete_below(self, connection: Connection, ordinal: int) -> None:
        connection.execute(delete(payloads).where(payloads.c.ordinal < ordinal))


def _key(place: Any) -> dict[str, int]:
    return {name: getattr(place, name) for name in ("ordinal", "start", "lease_id")}


def _sealed(record: bytes) -> bytes:
    return zlib.crc32(record).to_bytes(4, "little") + record


def _opened(data: bytes, where: str) -> bytes:
    if int.from_bytes(data[:4], "little") != zlib.crc32(data[4:]) or len(data) <= 4:
        problem = f"this payload cannot be used: {'its checksum does not match' if data else 'it is missing'}"
        fix = "resume the run from its checkpoint: the group is then sampled again"
        raise DatabaseError(problem, key="payload", value=where, fix=fix)
    return data[4:]
