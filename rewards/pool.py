"""The verifier pool: scores samples in killable, confined processes, with a deadline on each."""

from __future__ import annotations

import asyncio
import math
import os
import shutil
import tempfile
import threading
import time
import warnings
import weakref
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from dataclasses import fields
from types import TracebackType
from typing import Any

from rewards.base import Sample, Score
from rewards.errors import RewardError
from rewards.keeper import ATTEMPTS, GRACE_S, LONGEST_BACK_OFF_S, PoolCounts, Shared, Task, serve
from rewards.sandbox import Limits, check_mode
from rewards.spec import check_spec
from rewards.wire import Setup, encode

__all__ = ["PoolCounts", "VerifierPool"]

_JOIN_S = 20.0


class VerifierPool:
    """Scores samples with the rewards of a specification, in `workers` processes.

    spec: names to `{"_target_": import path, "weight": float, **settings}`.
    timeout_s: wall-clock seconds for one sample over all its rewards; then the child that scores it
        is killed and the sample's score is None with reason "timeout".
    batch_size: most samples handed to a worker at once.
    isolated: fork a child for each sample, not for each batch; model text that runs can then reach
        no other sample of its batch. Costs a few milliseconds a sample.
    sandbox: "strict" or "limits", see `rewards.sandbox`.
    limits: resource limits of a scoring child.
    read_paths: further files and folders a reward may read while it scores.
    start_timeout_s: for a worker to import the rewards and warm them up.
    max_restarts: workers may die so often in a row without one score between; then the pool fails.

    All methods may be called from any thread and any event loop. Raises RewardError if the
    specification is wrong, a worker cannot start, or workers die in a row.
    """

    def __init__(
        self,
        spec: Mapping[str, Any],
        workers: int = 2,
        timeout_s: float = 5.0,
        *,
        batch_size: int = 8,
        isolated: bool = False,
        sandbox: str = "strict",
        limits: Limits | None = None,
        read_paths: Sequence[str | os.PathLike[str]] = (),
        start_timeout_s: float = 60.0,
        max_restarts: int = 5,
    ) -> None:
        plain = check_spec(spec)
        limits = limits or Limits()
        counts = {"workers": workers, "batch_size": batch_size, "max_restarts": max_restarts}
        counts |= {item.name: getattr(limits, item.name) for item in fields(limits)}
        for name, value in counts.items():
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise RewardError(f"{name}={value!r} must be a whole number of at least 1")
        for name, seconds in {"timeout_s": timeout_s, "start_timeout_s": start_timeout_s}.items():
            if not 0 < seconds < math.inf:
                raise RewardError(f"{name}={seconds!r} must be a finite number of seconds above 0")
        paths = [os.path.abspath(path) for path in read_paths]
        for path in paths:
            if not os.path.exists(path):
                raise RewardError(f"read_paths: {path!r} does not exist")
        mode = check_mode(sandbox)
        if mode == "limits":
            warnings.warn(
                "sandbox=limits: model output that a scorer evaluates can write files, open "
                "sockets and start processes; sandbox=strict prevents it",
                RuntimeWarning,
                stacklevel=2,
            )
        work_dir = tempfile.mkdtemp(prefix="rewards-")
        setup = Setup(plain, timeout_s, isolated, mode, limits, paths, work_dir)
        try:
            encode(setup)
        except (TypeError, UnicodeEncodeError) as error:
            shutil.rmtree(work_dir)
            raise RewardError(f"reward settings must be plain JSON values: {error}") from error
        self._batch_size = batch_size
        self._shared = Shared(setup, start_timeout_s, max_restarts, os.getpid(), *os.pipe())
        started: list[Future[None]] = [Future() for _ in range(workers)]
        self._threads = [
            threading.Thread(target=serve, args=(self._shared, index, ready), name=f"verifier-{index}", daemon=True)
            for index, ready in enumerate(started)
        ]
        # Also at interpreter exit and when the pool is dropped unclosed.
        self._finalizer = weakref.finalize(self, _shut_down, self._shared, self._threads)
        for thread in self._threads:
            thread.start()
        try:
            for ready in started:
                ready.result(start_timeout_s + GRACE_S)
        except BaseException:
            self.close()
            raise

    async def score(self, samples: Sequence[Sample]) -> list[Score]:
        """Scores in the order of the samples. Raises RewardError, never for a single bad sample."""
        futures = self._submit(samples)
        limit_s = self._deadline_s()
        gathered = asyncio.gather(*(asyncio.wrap_future(future) for future in futures))
        try:
            return list(await asyncio.wait_for(gathered, limit_s))
        except TimeoutError:
            raise self._overdue(futures, limit_s) from None

    def score_sync(self, samples: Sequence[Sample]) -> list[Score]:
        """`score` for callers without an event loop."""
        futures = self._submit(samples)
        limit_s = self._deadline_s()
        deadline = time.monotonic() + limit_s
        try:
            return [future.result(max(0.0, deadline - time.monotonic())) for future in futures]
        except FutureTimeout:
            raise self._overdue(futures, limit_s) from None

    @property
    def counts(self) -> PoolCounts:
        """A copy of the counters."""
        with self._shared.lock:
            now = self._shared.counts
            return PoolCounts(*(getattr(now, item.name) for item in fields(now)))

    @property
    def worker_pids(self) -> list[int]:
        """Process ids of the workers that live now."""
        with self._shared.lock:
            return list(self._shared.pids.values())

    def close(self) -> None:
        """End all workers and their children; samples still waiting fail with RewardError."""
        self._finalizer()

    def __enter__(self) -> VerifierPool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    async def __aenter__(self) -> VerifierPool:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await asyncio.to_thread(self.close)

    def _submit(self, samples: Sequence[Sample]) -> list[Future[Score]]:
        shared = self._shared
        if os.getpid() != shared.owner:
            raise RewardError("the verifier pool was made before this process was forked; make one in each")
        tasks, futures = [], []
        for position, sample in enumerate(samples):
            future: Future[Score] = Future()
            futures.append(future)
            try:
                tasks.append(Task(encode(sample), future))
            except UnicodeEncodeError as error:
                # A lone surrogate is the model's or the data's doing; the others go on.
                parts: dict[str, float | None] = dict.fromkeys(shared.setup.spec)
                reason = f"text cannot be encoded as UTF-8: {error}"
                future.set_result(Score(None, parts, None, reason, 0.0))
            except TypeError as error:
                raise RewardError(f"sample {position}: metadata must be plain JSON values: {error}") from error
        with shared.lock:
            if shared.failure is not None:
                raise shared.failure
            if shared.closing.is_set():
                raise RewardError("the verifier pool is closed; make a new one")
            shared.waiting.update(task.future for task in tasks)
        for task in tasks:
            task.future.add_done_callback(shared.forget)
        # Small jobs spread over the workers too.
        size = min(self._batch_size, -(-len(tasks) // len(self._threads)) or 1)
        for start in range(0, len(tasks), size):
            shared.batches.put(tasks[start : start + size])
        return futures

    def _deadline_s(self) -> float:
        """No sample can be pending longer: each has its limit, each worker death its back-off."""
        with self._shared.lock:
            pending = len(self._shared.waiting)
        each = self._shared.setup.timeout_s + GRACE_S
        restarts = self._shared.max_restarts * (self._shared.start_timeout_s + LONGEST_BACK_OFF_S)
        return ATTEMPTS * (pending + 1) * each + restarts

    def _overdue(self, futures: Sequence[Future[Score]], limit_s: float) -> RewardError:
        missing = sum(not future.done() for future in futures)
        return RewardError(
            f"verifier pool: {missing} of {len(futures)} samples without a score after "
            f"{limit_s:.0f} s; workers {self.worker_pids}, counts {self.counts}"
        )


def _shut_down(shared: Shared, threads: Sequence[threading.Thread]) -> None:
    if os.getpid() != shared.owner:  # a fork of the owner has no workers to end
        return
    with shared.lock:
        shared.closing.set()
    os.write(shared.hang_up, b"x")
    shared.fail(RewardError("the verifier pool was closed"))
    for _ in threads:
        shared.batches.put(None)
    deadline = time.monotonic() + _JOIN_S
    for thread in threads:
        if thread.ident is not None and thread is not threading.current_thread():
            thread.join(max(0.0, deadline - time.monotonic()))
    shutil.rmtree(shared.setup.work_dir, ignore_errors=True)
    alive = [thread.name for thread in threads if thread.is_alive()]
    if not alive:  # else a thread could poll a number that stands for another file by now
        os.close(shared.watch)
        os.close(shared.hang_up)
    else:
        raise RewardError(f"verifier pool: {', '.join(alive)} did not end within {_JOIN_S} s")
