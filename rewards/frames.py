"""Length-prefixed frames over pipes, with a deadline on every wait."""

from __future__ import annotations

import os
import select
import struct
import time

__all__ = ["FrameReader", "FrameTooLarge", "HungUp", "write_frame"]

_HEADER = struct.Struct(">I")


class FrameTooLarge(Exception):
    """The header announces more bytes than the reader accepts."""


class HungUp(Exception):
    """The watched pipe has bytes or an end: nobody wants the frame any more."""


def _poll(fd: int, events: int, deadline: float | None, watch: int | None = None) -> None:
    """Wait until fd is ready. Raises TimeoutError at `deadline` (of `time.monotonic`), HungUp."""
    poller = select.poll()
    poller.register(fd, events)
    if watch is not None:
        poller.register(watch, select.POLLIN)
    wait_ms = None if deadline is None else max(0.0, (deadline - time.monotonic()) * 1000)
    ready = dict(poller.poll(wait_ms))
    if watch in ready:
        raise HungUp
    if not ready:
        raise TimeoutError


def write_frame(fd: int, payload: bytes, deadline: float | None = None, watch: int | None = None) -> None:
    """Write one frame. Raises TimeoutError, HungUp, or BrokenPipeError if the reader is gone.

    With a deadline the descriptor must be non-blocking, or a full pipe outlasts it.
    """
    view = memoryview(_HEADER.pack(len(payload)) + payload)
    while view:
        if deadline is not None:
            _poll(fd, select.POLLOUT, deadline, watch)
        try:
            view = view[os.write(fd, view) :]
        except BlockingIOError:
            continue


class FrameReader:
    """Reads frames from one descriptor; keeps what it read beyond a frame.

    watch: a pipe's read end; once it has a byte or no writer, every wait ends with HungUp.
    """

    __slots__ = ("_buffer", "_fd", "_limit", "_watch")

    def __init__(self, fd: int, limit_bytes: int, watch: int | None = None) -> None:
        self._fd = fd
        self._limit = limit_bytes
        self._watch = watch
        self._buffer = bytearray()

    def read(self, deadline: float | None) -> bytes | None:
        """The next frame; None at end of file. Raises TimeoutError, HungUp, FrameTooLarge."""
        header = self._take(_HEADER.size, deadline)
        if header is None:
            return None
        (size,) = _HEADER.unpack(header)
        if size > self._limit:
            raise FrameTooLarge(f"{size} bytes announced, {self._limit} accepted")
        return self._take(size, deadline)

    def _take(self, size: int, deadline: float | None) -> bytes | None:
        while len(self._buffer) < size:
            _poll(self._fd, select.POLLIN, deadline, self._watch)
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
