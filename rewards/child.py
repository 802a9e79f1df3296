"""The scoring child: forked from the warm worker, confined, then given model text."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import NoReturn

from rewards.base import Sample
from rewards.frames import write_frame
from rewards.sandbox import Sandbox, die_with
from rewards.spec import Measurement, RewardSet
from rewards.wire import Measured, encode

__all__ = ["CONFINED", "run_child"]

CONFINED = b"confined"
MAX_TEXT_CHARS = 10_000


def run_child(
    worker: int,
    results: int,
    turns: int,
    rewards: RewardSet,
    sandbox: Sandbox,
    samples: Sequence[tuple[int, Sample]],
    work_dir: str,
    cpu_seconds: int,
) -> NoReturn:
    """Confine this process, then score `samples` in order, one frame each on fd `results`.

    A byte on fd `turns` starts each sample: the worker has passed the one before on by then, so
    that whatever a sample does, it costs no other one's score.

    Writes CONFINED first, or why it could not confine itself. Leaves by os._exit: nothing of the
    worker's own exit handlers may run here.
    """
    status = 1
    try:
        if _confine(worker, results, turns, sandbox, work_dir, cpu_seconds):
            for index, sample in samples:
                if not os.read(turns, 1):
                    break
                write_frame(results, _encode(index, rewards.measure(sample)))
            status = 0
    finally:
        os._exit(status)


def _confine(worker: int, results: int, turns: int, sandbox: Sandbox, work_dir: str, cpu_seconds: int) -> bool:
    """Confine this process and say so on `results`, or say why not."""
    try:
        os.setsid()
        die_with(worker)
        _drop_descriptors(keep={results, turns} | sandbox.kept_fds())
        os.chdir(work_dir)
        sandbox.enter(cpu_seconds)
    except Exception as error:  # whatever it is, the worker must hear of it
        write_frame(results, f"{type(error).__name__}: {error}".encode())
        return False
    write_frame(results, CONFINED)
    return True


def _encode(index: int, measured: Measurement) -> bytes:
    reasons = {name: _plain(reason) for name, reason in measured.reasons.items()}
    answer = None if measured.answer is None else _plain(measured.answer)
    return encode(Measured(index, measured.parts, reasons, answer))


def _plain(text: str) -> str:
    """Cut to a sane length; without lone surrogates, which JSON cannot carry."""
    return text[:MAX_TEXT_CHARS].encode("utf-8", "replace").decode("utf-8")


def _drop_descriptors(keep: set[int]) -> None:
    """Standard streams to /dev/null; all others but `keep` closed, the worker's pipes too."""
    null = os.open(os.devnull, os.O_RDWR)
    for fd in (0, 1, 2):
        os.dup2(null, fd)
    low = 3
    for fd in sorted(keep):
        os.closerange(low, fd)
        low = fd + 1
    os.closerange(low, os.sysconf("SC_OPEN_MAX"))
