"""`rlkit train` as a process with parts, for tests that break it: what it does, what it holds, who belongs to it."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
from tiny import TINY

DEADLINE_S = 150.0  # of every wait: a full machine is slow


def settings(folder: Path, name: str, *more: str) -> list[str]:
    return [*TINY, f"output_dir={folder}", f"sft.cache_dir={folder}/cache", f"name={name}", *more]


def until(holds: Callable[[], Any], what: str = "", deadline_s: float = DEADLINE_S) -> Any:
    end = time.monotonic() + deadline_s
    while not (found := holds()):
        assert time.monotonic() < end, what or holds
        time.sleep(0.02)
    return found


class Command:
    """A process of `rlkit`, what it prints, and its parts."""

    def __init__(self, command: str, arguments: list[str], **environment: str) -> None:
        self.log = Path(next(x.partition("=")[2] for x in arguments if x.startswith("output_dir="))) / f"{command}.txt"
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "rlkit", command, *arguments], stdout=log, stderr=log, start_new_session=True,
                env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
            )  # fmt: skip

    def text(self) -> str:
        return self.log.read_text(errors="replace")

    def everyone(self) -> list[psutil.Process]:
        with contextlib.suppress(psutil.NoSuchProcess):
            return psutil.Process(self.process.pid).children(recursive=True)
        return []

    def part(self, name: str) -> psutil.Process | None:
        """The oldest living `rlkit <name>` among its children."""
        for child in self.everyone():
            with contextlib.suppress(psutil.NoSuchProcess):
                if name in child.cmdline() and child.status() not in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD):
                    return child
        return None

    def ended(self) -> int:
        """Its exit status, once it has ended."""
        until(lambda: self.process.poll() is not None, f"it did not end:\n{self.text()[-3000:]}")
        return self.process.returncode


@contextlib.contextmanager
def running(command: str, arguments: list[str], **environment: str) -> Iterator[Command]:
    """The command; afterwards nobody of it may be left, and whoever is left is killed."""
    it = Command(command, arguments, **environment)
    known = dict[int, psutil.Process]()
    try:
        yield it
        known |= {x.pid: x for x in it.everyone()}
        it.ended()
        until(
            lambda: not any(x.is_running() and x.status() != psutil.STATUS_ZOMBIE for x in known.values()), "left", 20
        )
    finally:
        for process in [*known.values(), *it.everyone()]:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(it.process.pid, signal.SIGKILL)
        it.process.wait(20)


def rows(run: Path, query: str) -> list[Any]:
    """Of the run's SQLite buffer; [] while there is none."""
    if not (run / "buffer.db").exists():
        return []
    with contextlib.closing(sqlite3.connect(f"file:{run}/buffer.db?mode=ro", uri=True, timeout=60)) as connection:
        try:
            return connection.execute(query).fetchall()
        except sqlite3.OperationalError as error:
            if "no such table" in str(error):
                return []
            raise


def step(run: Path) -> int:
    """Learner steps, -1 while there is no buffer."""
    return next((step for (step,) in rows(run, "SELECT step FROM meta")), -1)


def trained(run: Path) -> list[int]:
    return [
        x for (x,) in rows(run, "SELECT ordinal FROM groups WHERE state = 'trained' ORDER BY trained_step, ordinal")
    ]


def metrics(run: Path, *without: str) -> list[dict[str, float]]:
    """Rows of metrics.jsonl without times, and without what else begins so."""
    left_out = ("time", "seconds", "perf/", *without)
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if not k.startswith(left_out)} for line in lines]


def evaluated(run: Path) -> dict[int, dict[str, float]]:
    """eval/ metrics by step; a step that is there twice fails."""
    found: dict[int, dict[str, float]] = {}
    for row in metrics(run):
        if own := {k: v for k, v in row.items() if k.startswith("eval/")}:
            assert row["step"] not in found
            found[int(row["step"])] = own
    return found
