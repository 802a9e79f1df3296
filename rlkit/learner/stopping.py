"""SIGINT and SIGTERM: asked for once, acted on at the next safe point, forced the second time."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable

from rlkit.errors import Interrupted


def interruptible(body: Callable[[Callable[[], None]], None]) -> int:
    """Run `body(check_stop)`; return 0, or 128 + signal number, as a shell reports it.

    `check_stop` raises Interrupted once a signal has arrived. It is called between stretches of
    generation, before a step's first update and between evaluation batches: places where the run
    can be left as it was at the last finished step.
    """
    received: list[int] = []

    def handle(number: int, frame: object) -> None:
        # os.write: print is not safe inside a signal handler.
        if received:
            os.write(sys.stderr.fileno(), b"\nsecond signal: leaving at once\n")
            os._exit(128 + number)
        received.append(number)
        name = signal.Signals(number).name
        os.write(sys.stderr.fileno(), f"\n{name}: stopping at the next safe point\n".encode())

    def check_stop() -> None:
        if received:
            name = signal.Signals(received[0]).name
            raise Interrupted(f"stopped by {name}; the same command goes on from the checkpoint")

    previous = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        body(check_stop)
    except Interrupted as stopped:
        print(stopped)
        return 128 + received[0]
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    return 0
