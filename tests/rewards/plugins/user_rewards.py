"""Rewards as a user would write them, outside the package; some misbehave on purpose."""

from __future__ import annotations

import asyncio
import ctypes
import os
import signal
import sys
import threading
import time
from dataclasses import dataclass, field
from typing import Any

from rewards import Sample, Unscorable


@dataclass(frozen=True, slots=True)
class Misbehave:
    """Does what the completion says."""

    def __call__(self, sample: Sample) -> Any:
        match sample.completion.split(" "):
            case ["value", text]:
                return float(text)
            case ["none"]:
                return None
            case ["text"]:
                return "high"
            case ["unscorable"]:
                raise Unscorable("no such reference")
            case ["raise"]:
                raise ValueError("told to")
            case ["sleep", text]:
                time.sleep(float(text))
            case ["spin"]:
                while True:
                    pass
            case ["segfault"]:
                ctypes.string_at(0)
            case ["exit", text]:
                os._exit(int(text))
            case ["sys.exit"]:
                sys.exit(0)
            case ["close-everything"]:
                os.closerange(3, 1000)
                time.sleep(60)
            case ["garbage"]:
                for fd in range(3, 64):
                    try:
                        os.write(fd, b"junk\n")
                    except OSError:
                        continue
                time.sleep(60)
            case ["huge-line"]:
                for fd in range(3, 64):
                    try:
                        os.write(fd, b"9" * (1 << 22))
                    except OSError:
                        continue
                time.sleep(60)
            case ["answer-ahead"]:
                for fd in range(3, 64):
                    try:
                        os.write(fd, b'[0,{"parts":{"told":7,"same":0},"reasons":{},"answer":null}]\n')
                    except OSError:
                        continue
            case ["kill-parent"]:
                os.kill(os.getppid(), signal.SIGKILL)
                time.sleep(0.5)
            case ["pid"]:
                return float(os.getpid())
            case ["evaluate", *rest]:
                return float(bool(eval(" ".join(rest))))
        return 1.0


@dataclass(frozen=True, slots=True)
class HoldsThread:
    """Starts a thread in the worker, another one and an event loop while it scores."""

    stop: threading.Event = field(default_factory=threading.Event, init=False)

    def __post_init__(self) -> None:
        threading.Thread(target=self.stop.wait).start()

    def __call__(self, sample: Sample) -> float:
        found: list[float] = []
        thread = threading.Thread(target=lambda: found.append(float(sample.completion)))
        thread.start()
        thread.join()
        threading.Thread(target=time.sleep, args=(3600,)).start()

        async def double() -> float:
            await asyncio.sleep(0.001)
            return await asyncio.to_thread(lambda: 2 * found[0])

        return asyncio.run(double())


@dataclass(frozen=True, slots=True)
class BreaksAtStart:
    """Fails while the worker warms up."""

    how: str

    def __call__(self, sample: Sample) -> float:
        return 1.0

    def warm_up(self) -> None:
        if self.how == "raise":
            raise OSError("no judge here")
        print("last words", file=sys.stderr, flush=True)
        os._exit(7)


def equals(sample: Sample, *, factor: float = 1.0) -> float:
    """A plain function as a reward."""
    return factor * (sample.completion == sample.reference)
