"""Payload store: long records outside the database, each with its length and checksum.

A record is a 12-byte header (magic "rlk1", length, crc32; little-endian) and the body. Every process appends to
segment files of its own, so records never interleave; the database keeps where a record lies. `append` returns once
the operating system has the bytes, and the caller commits the row that refers to them afterwards. A crash of the
process therefore loses no record a row refers to; a power loss can, and so can a bad disk: reading verifies, and such
a record is never used.
"""

import os
import struct
import zlib
from collections.abc import Collection
from pathlib import Path
from typing import NamedTuple
from uuid import uuid4

from rlkit.errors import BufferError

_HEADER = struct.Struct("<4sII")
_MAGIC = b"rlk1"
_SUFFIX = ".segment"


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
