"""Ends a server with everything that belongs to it, also when the process that started it is killed (Linux).

`python -m rlkit.rollout.guard GROUP` waits on its stdin, a pipe, until whoever holds the other end is gone; then it
ends the process group.
"""

import contextlib
import os
import signal
import sys
import time
from pathlib import Path

END_S = 20.0  # from SIGTERM to SIGKILL


def end(group: int) -> None:
    """End a process group: the leader by SIGTERM, the rest by SIGKILL; nothing stays in shared memory. Idempotent."""
    if not members(group):
        return
    with contextlib.suppress(ProcessLookupError):
        os.kill(group, signal.SIGTERM)
        os.killpg(group, signal.SIGCONT)  # a stopped one would not hear it
    _wait(group, trackers=False)
    for pid in members(group, trackers=False):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    _wait(group, trackers=True)  # these remove the shared memory of those that were killed
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, signal.SIGKILL)


def _wait(group: int, trackers: bool) -> None:
    deadline = time.monotonic() + END_S
    while members(group, trackers) and time.monotonic() < deadline:
        time.sleep(0.02)


def members(group: int, trackers: bool = True) -> list[int]:
    """Processes of a process group that have not ended, with or without Python's resource trackers."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            state, _, leader = (process / "stat").read_text().rpartition(")")[2].split()[:3]
            tracker = b"resource_tracker" in (process / "cmdline").read_bytes()
            if int(leader) == group and state != "Z" and (trackers or not tracker):
                found.append(int(process.name))
    return found


if __name__ == "__main__":
    sys.stdin.buffer.read()
    end(int(sys.argv[1]))
