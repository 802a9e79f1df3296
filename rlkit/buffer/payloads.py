"""Payload store: long records outside the database, each with its length and checksum.

A record is a 12-byte header (magic "rlk1", length, crc32; little-endian) and the body. Every
process appends to segment files of its own, so records never interleave; the database keeps where
a record lies. `append` returns once the operating system has the bytes, and the caller commits the
row that refers to them afterwards. A crash of the process therefore loses no record a row refers
to; a power loss can, and so can a bad disk: reading verifies, and such a record is never used.
"""

from __future__ import annotations

import os
import struct
import threading
import zlib
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol
from uuid import uuid4

from rlkit.errors import BufferError

_HEADER = struct.Struct("<4sII")
_MAGIC = b"rlk1"
_SUFFIX = ".segment"


@dataclass(frozen=True, slots=True)
class PayloadRef:
    """Where a record lies: segment name, byte offset of its header, length of its body."""

    segment: str
    offset: int
    length: int


class PayloadStore(Protocol):
    """What the buffer needs of a store: segment files here; rows of a database could be another."""

    def append(self, record: bytes) -> PayloadRef:
        """Store a record. Called under the database's write lock."""

    def read(self, ref: PayloadRef) -> bytes:
        """The record; BufferError naming segment and offset if it is missing, torn or altered."""

    def keep_only(self, segments: Collection[str]) -> int:
        """Delete every other segment; returns how many. Called under the database's write lock."""

    def close(self) -> None:
        """Release files."""


class SegmentFiles:
    """Append-only segment files in one folder that all processes of a node share.

    Args:
        folder: created when missing.
        segment_bytes: a segment that has grown past this is left and a new one begun.
    """

    def __init__(self, folder: Path, *, segment_bytes: int = 64 * 2**20) -> None:
        self._folder = folder
        self._segment_bytes = segment_bytes
        self._lock = threading.Lock()
        self._segment = ""
        self._descriptor: int | None = None
        self._pid = os.getpid()
        folder.mkdir(parents=True, exist_ok=True)

    def append(self, record: bytes) -> PayloadRef:
        """See PayloadStore. A full disk raises BufferError; no row refers to the torn bytes."""
        with self._lock:
            descriptor = self._writable()
            offset = os.lseek(descriptor, 0, os.SEEK_END)
            data = memoryview(_HEADER.pack(_MAGIC, len(record), zlib.crc32(record)) + record)
            try:
                while data:
                    data = data[os.write(descriptor, data) :]
            except OSError as error:
                problem, place = f"cannot write a payload: {error.strerror}", str(self._folder / self._segment)
                raise BufferError(problem, key="segment", value=place, fix="free disk space and resume") from error
            return PayloadRef(self._segment, offset, len(record))

    def read(self, ref: PayloadRef) -> bytes:
        """See PayloadStore."""
        try:
            with open(self._folder / ref.segment, "rb", buffering=0) as file:
                data = os.pread(file.fileno(), _HEADER.size + ref.length, ref.offset)
        except FileNotFoundError:
            raise self._bad(ref, "its segment is missing") from None
        if len(data) < _HEADER.size + ref.length:
            raise self._bad(ref, f"torn: {len(data)} of {_HEADER.size + ref.length} bytes")
        magic, length, checksum = _HEADER.unpack_from(data)
        body = data[_HEADER.size :]
        if magic != _MAGIC or length != ref.length:
            raise self._bad(ref, "its header is altered")
        if zlib.crc32(body) != checksum:
            raise self._bad(ref, "its checksum does not match")
        return body

    def keep_only(self, segments: Collection[str]) -> int:
        """See PayloadStore. A writer whose segment goes begins a new one at its next append."""
        unused = [x for x in self._folder.glob(f"*{_SUFFIX}") if x.name not in segments]
        for path in unused:
            path.unlink(missing_ok=True)
        return len(unused)

    def close(self) -> None:
        """Idempotent."""
        with self._lock:
            self._leave()

    def _writable(self) -> int:
        if self._descriptor is not None:
            state = os.fstat(self._descriptor)
            own = self._pid == os.getpid()  # after a fork the segment stays the parent's
            if own and state.st_nlink > 0 and state.st_size < self._segment_bytes:
                return self._descriptor
            self._leave()
        self._pid = os.getpid()
        self._segment = f"{self._pid}-{uuid4().hex[:12]}{_SUFFIX}"
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_CLOEXEC
        self._descriptor = os.open(self._folder / self._segment, flags, 0o644)
        return self._descriptor

    def _leave(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def _bad(self, ref: PayloadRef, problem: str) -> BufferError:
        text = f"payload in segment {ref.segment} at offset {ref.offset} cannot be used: {problem}"
        fix = "resume the run from its checkpoint: the group is then sampled again"
        return BufferError(text, key="payloads", value=str(self._folder), fix=fix)
