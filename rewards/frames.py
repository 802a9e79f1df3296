"""Length-prefixed frames over pipes, with a deadline on every wait."""

from __future__ import annotations

import os
import select
import struct
import time

__all__ = ["FrameReader", "FrameTooLarge", "write_frame"]

_HEADER = struct.Struct(">I")


class FrameTooLarge(Exception):
    """The header announces more bytes than the reader accepts."""


def _poll(fd: int, events: int, deadline: float | None) -> None:
    """Wait until fd is ready, or raise TimeoutError at `deadline` (of `time.monotonic`)."""
    poller = select.poll()
    poller.register(fd, events)
    wait_ms = None if deadline is None else max(0.0, (deadline - time.monotonic()) * 1000)
    if not poller.poll(wait_ms):
        raise TimeoutError


def write_frame(fd: int, payload: bytes, deadline: float | None = None) -> None:
    """Write one frame. Raises TimeoutError, or BrokenPipeError if the reader is gone.

    With a deadline the descriptor must be non-blocking, or a full pipe outlasts it.
    """
    view = memoryview(_HEADER.pack(len(payload)) + payload)
    while view:
        if deadline is not None:
            _poll(fd, select.POLLOUT, deadline)
        try:
            view = view[os.write(fd, view) :]
        except BlockingIOError:
            continue


class FrameReader:
    """Reads frames from one descriptor; keeps what it read beyond a frame."""

    __slots__ = ("_buffer", "_fd", "_limit")

    def __init__(self, fd: int, limit_bytes: int) -> None:
        self._fd = fd
        self._limit = limit_bytes
        self._buffer = bytearray()

    @property
    def pending(self) -> bool:
        """Whether bytes were read that no frame has taken yet."""
        return bool(self._buffer)

    def read(self, deadline: float | None) -> bytes | None:
        """The next frame; None at end of file. Raises TimeoutError, FrameTooLarge."""
        header = self._take(_HEADER.size, deadline)
        if header is None:
            return None
        (size,) = _HEADER.unpack(header)
        if size > self._limit:
            raise FrameTooLarge(f"{size} bytes announced, {self._limit} accepted")
        return self._take(size, deadline)

    def _take(self, size: int, deadline: float | None) -> bytes | None:
        while len(self._buffer) < size:
            _poll(self._fd, select.POLLIN, deadline)
            try:
                chunk = os.read(self._fd, 1 << 16)
            except BlockingIOError:
                continue
            if not chunk:
                return None
            self._buffer += chunk
        taken = bytes(self._buffer[:size])
        del self._buffer[:size]
        return taken
