"""The scoring child: forked from the warm worker, confined, then given model text."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import NoReturn

from rewards.base import Sample
from rewards.frames import write_frame
from rewards.sandbox import Sandbox, die_with
from rewards.spec import RewardSet
from rewards.wire import Measured, encode

__all__ = ["CONFINED", "run_child"]

CONFINED = b"confined"
MAX_TEXT_CHARS = 10_000


def run_child(
    worker: int,
    results: int,
    rewards: RewardSet,
    sandbox: Sandbox,
    samples: Sequence[tuple[int, Sample]],
    work_dir: str,
    cpu_seconds: int,
) -> NoReturn:
    """Confine this process, then score `samples` in order, one frame each on fd `results`.

    Writes CONFINED first, or why it could not confine itself. Leaves by os._exit: nothing of the
    worker's own exit handlers may run here.
    """
    status = 1
    try:
        os.setsid()
        die_with(worker)
        _drop_descriptors(keep={results} | sandbox.kept_fds())
        os.chdir(work_dir)
        try:
            sandbox.enter(cpu_seconds)
        except Exception as error:
            write_frame(results, f"{type(error).__name__}: {error}".encode())
            return
        write_frame(results, CONFINED)
        for index, sample in samples:
            measured = rewards.measure(sample)
            write_frame(results, _encode(index, measured.parts, measured.reasons, measured.answer))
        status = 0
    finally:
        os._exit(status)


def _encode(
    index: int, parts: dict[str, float | None], reasons: dict[str, str], answer: str | None
) -> bytes:
    reasons = {name: _plain(reason) for name, reason in reasons.items()}
    return encode(Measured(index, parts, reasons, None if answer is None else _plain(answer)))


def _plain(text: str) -> str:
    """Cut to a sane length; without lone surrogates, which JSON cannot carry."""
    return text[:MAX_TEXT_CHARS].encode("utf-8", "replace").decode("utf-8")


def _drop_descriptors(keep: set[int]) -> None:
    """Standard streams to /dev/null, all others but `keep` closed, the worker's pipes among them."""
    null = os.open(os.devnull, os.O_RDWR)
    for fd in (0, 1, 2):
        os.dup2(null, fd)
    low = 3
    for fd in sorted(keep):
        os.closerange(low, fd)
        low = fd + 1
    os.closerange(low, os.sysconf("SC_OPEN_MAX"))
