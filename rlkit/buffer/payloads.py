"""Payloads: records as bytes, and the segment files outside the database that hold the long ones.

Values are msgpack, arrays as raw numbers: integers take 4 bytes where that holds them, else 8, and an array of one
repeated value is stored as that value; a 16k-token single-turn rollout takes about 130 kB. What comes back is equal bit
for bit, dtypes included. A prompt's metadata holds JSON values (load_prompts sees to it): tuples come back as lists.

A record in a segment is a 12-byte header (magic "rlk1", length, crc32; little-endian) and the body. Every process
appends to segment files of its own; the database keeps where a record lies. `append` returns once the operating system
has the bytes, and the row that refers to them is committed afterwards: only a power loss or a bad disk loses a record
that a row refers to, and reading finds that.
"""

import os
import struct
import zlib
from collections.abc import Collection
from pathlib import Path
from typing import Any, NamedTuple, TypeVar
from uuid import uuid4

import msgspec
import numpy as np

from rlkit.buffer.protocol import require
from rlkit.errors import BufferError
from rlkit.types import Rollout

T = TypeVar("T")
_ARRAYS = {"token_ids": np.int64, "behavior_logprobs": np.float32, "loss_mask": np.bool_, "segments": np.int64}
_HEADER = struct.Struct("<4sII")
_MAGIC = b"rlk1"
_SUFFIX = ".segment"


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


class PayloadRef(NamedTuple):
    """Where a record lies: segment name, byte offset of its header, length of its body."""

    segment: str
    offset: int
    length: int


class SegmentFiles:
    """Append-only segment files in one folder (made if missing) that all processes of a node share.

    A segment that has grown past `segment_bytes` is left and a new one begun.
    """

    def __init__(self, folder: Path, *, segment_bytes: int = 64 * 2**20) -> None:
        self._folder = folder
        self._segment_bytes = segment_bytes
        self._segment = ""
        self._descriptor: int | None = None
        self._pid = os.getpid()
        folder.mkdir(parents=True, exist_ok=True)

    def append(self, record: bytes) -> PayloadRef:
        """Store a record, under the database's write lock; BufferError if the disk is full."""
        descriptor = self._writable()
        offset = os.lseek(descriptor, 0, os.SEEK_END)
        data = memoryview(_HEADER.pack(_MAGIC, len(record), zlib.crc32(record)) + record)
        try:
            while data:
                data = data[os.write(descriptor, data) :]
        except OSError as error:  # no row refers to the torn bytes
            problem, place = f"cannot write a payload: {error.strerror}", str(self._folder / self._segment)
            raise BufferError(problem, key="segment", value=place, fix="free disk space and resume") from error
        return PayloadRef(self._segment, offset, len(record))

    def read(self, ref: PayloadRef) -> bytes:
        """The record; BufferError naming segment and offset if it is missing, torn or altered."""
        end = _HEADER.size + ref.length
        try:
            with open(self._folder / ref.segment, "rb", buffering=0) as file:
                data = os.pread(file.fileno(), end, ref.offset)
        except FileNotFoundError:
            raise self._bad(ref, "its segment is missing") from None
        if len(data) < end:
            raise self._bad(ref, f"torn: {len(data)} of {end} bytes")
        body = data[_HEADER.size :]
        if _HEADER.unpack_from(data) != (_MAGIC, ref.length, zlib.crc32(body)):
            raise self._bad(ref, "its header or checksum does not match")
        return body

    def keep_only(self, segments: Collection[str]) -> None:
        """Delete every other segment, under the database's write lock; its writer begins a new one when it appends."""
        for path in self._folder.glob(f"*{_SUFFIX}"):
            if path.name not in segments:
                path.unlink(missing_ok=True)

    def close(self) -> None:
        """Idempotent."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def _writable(self) -> int:
        if self._descriptor is not None:
            state = os.fstat(self._descriptor)
            own = self._pid == os.getpid()  # after a fork the segment stays the parent's
            if own and state.st_nlink > 0 and state.st_size < self._segment_bytes:
                return self._descriptor
            self.close()
        self._pid = os.getpid()
        self._segment = f"{self._pid}-{uuid4().hex[:12]}{_SUFFIX}"
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_CLOEXEC
        self._descriptor = os.open(self._folder / self._segment, flags, 0o644)
        return self._descriptor

    def _bad(self, ref: PayloadRef, problem: str) -> BufferError:
        text = f"payload in segment {ref.segment} at offset {ref.offset} cannot be used: {problem}"
        fix = "resume the run from its checkpoint: the group is then sampled again"
        return BufferError(text, key="payloads", value=str(self._folder), fix=fix)
