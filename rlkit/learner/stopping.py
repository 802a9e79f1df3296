"""SIGINT and SIGTERM: asked for once, acted on at the next safe point, forced the second time."""

from __future__ import annotations

import os
import signal
import sys
from types import FrameType, TracebackType
from typing import Any

from rlkit.errors import Interrupted


class StopSignals:
    """Context manager that turns the first signal into a request and the second into an exit.

    `check` is called between stretches of generation, before a step's first update and between
    evaluation batches: places where the run can be left as it was at the last finished step.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None:
            # os.write: print is not safe inside a signal handler.
            os.write(sys.stderr.fileno(), b"\nsecond signal: leaving at once\n")
            os._exit(128 + number)
        self.received = number
        name = signal.Signals(number).name
        os.write(sys.stderr.fileno(), f"\n{name}: stopping at the next safe point\n".encode())

    def check(self) -> None:
        """Raise Interrupted if a signal has arrived."""
        if self.received is not None:
            name = signal.Signals(self.received).name
            raise Interrupted(f"stopped by {name}; the same command goes on from the checkpoint")

    @property
    def exit_code(self) -> int:
        """128 + signal number, as a shell reports it."""
        return 128 + (self.received or 0)
