"""The verifier pool: scores samples in killable, confined processes, with a deadline on each."""

from __future__ import annotations

import asyncio
import contextlib
import math
import os
import queue
import shutil
import tempfile
import threading
import time
import warnings
import weakref
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, InvalidStateError
from concurrent.futures import TimeoutError as FutureTimeout
from dataclasses import dataclass, field, fields
from pathlib import Path
from types import TracebackType
from typing import Any

from rewards.base import Sample, Score
from rewards.errors import RewardError
from rewards.frames import HungUp
from rewards.process import WorkerDied, WorkerProcess
from rewards.sandbox import Limits, check_mode
from rewards.spec import check_spec
from rewards.wire import Setup, encode

__all__ = ["PoolCounts", "VerifierPool"]

_GRACE_S = (
    15.0  # beyond a sample's own limit: fork, confinement, kill and reaping on a busy machine
)
_BACK_OFF_S, _LONGEST_BACK_OFF_S = 0.1, 5.0
_JOIN_S = 20.0
_ATTEMPTS = 2  # how often a sample may be in hand when a worker dies before it is given up


@dataclass(slots=True)
class PoolCounts:
    """What went wrong since the pool was started, in samples (restarts: in processes)."""

    scored: int = 0
    unscored: int = 0
    timeouts: int = 0
    crashes: int = 0
    restarts: int = 0


@dataclass(slots=True)
class _Task:
    """One sample on its way: the frame's part it becomes and where its score goes."""

    encoded: bytes
    future: Future[Score]
    deaths: int = 0


@dataclass(slots=True)
class _Shared:
    """What the pool and its threads share. No reference to the pool, so that it can be collected."""

    setup: Setup
    start_timeout_s: float
    max_restarts: int
    owner: int
    watch: int  # a pipe's two ends: a byte into the second wakes every thread out of its wait
    hang_up: int
    batches: queue.SimpleQueue[list[_Task] | None] = field(default_factory=queue.SimpleQueue)
    closing: threading.Event = field(default_factory=threading.Event)
    lock: threading.Lock = field(default_factory=threading.Lock)
    counts: PoolCounts = field(default_factory=PoolCounts)
    pids: dict[int, int] = field(default_factory=dict)
    waiting: set[Future[Score]] = field(default_factory=set)
    failure: RewardError | None = None

    def fail(self, error: RewardError) -> None:
        """End all waiting samples with the error, and refuse new ones."""
        with self.lock:
            self.failure = self.failure or error
            waiting, self.waiting = list(self.waiting), set()
        for future in waiting:
            _settle(future, error)

    def finish(self, task: _Task, score: Score, outcome: str) -> None:
        with self.lock:
            self.waiting.discard(task.future)
            counts = self.counts
            counts.scored += score.score is not None
            counts.unscored += score.score is None
            counts.timeouts += outcome == "timeout"
            counts.crashes += outcome == "crashed"
        _settle(task.future, score)


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
        self._shared = _Shared(setup, start_timeout_s, max_restarts, os.getpid(), *os.pipe())
        started: list[Future[None]] = [Future() for _ in range(workers)]
        self._threads = [
            threading.Thread(
                target=_serve,
                args=(self._shared, index, ready),
                name=f"verifier-{index}",
                daemon=True,
            )
            for index, ready in enumerate(started)
        ]
        # Also at interpreter exit and when the pool is dropped unclosed.
        self._finalizer = weakref.finalize(self, _shut_down, self._shared, self._threads)
        for thread in self._threads:
            thread.start()
        try:
            for ready in started:
                ready.result(start_timeout_s + _GRACE_S)
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
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    async def __aenter__(self) -> VerifierPool:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await asyncio.to_thread(self.close)

    def _submit(self, samples: Sequence[Sample]) -> list[Future[Score]]:
        shared = self._shared
        if os.getpid() != shared.owner:
            raise RewardError(
                "the verifier pool was made before this process was forked; make one in each process"
            )
        tasks, futures = [], []
        for position, sample in enumerate(samples):
            future: Future[Score] = Future()
            futures.append(future)
            try:
                tasks.append(_Task(encode(sample), future))
            except UnicodeEncodeError as error:
                # A lone surrogate is the model's or the data's doing; the others go on.
                parts: dict[str, float | None] = dict.fromkeys(shared.setup.spec)
                reason = f"text cannot be encoded as UTF-8: {error}"
                future.set_result(Score(None, parts, None, reason, 0.0))
            except TypeError as error:
                raise RewardError(
                    f"sample {position}: metadata must be plain JSON values: {error}"
                ) from error
        with shared.lock:
            if shared.failure is not None:
                raise shared.failure
            if shared.closing.is_set():
                raise RewardError("the verifier pool is closed; make a new one")
            shared.waiting.update(task.future for task in tasks)
        # Small jobs spread over the workers too.
        size = min(self._batch_size, -(-len(tasks) // len(self._threads)) or 1)
        for start in range(0, len(tasks), size):
            shared.batches.put(tasks[start : start + size])
        return futures

    def _deadline_s(self) -> float:
        """No sample can be pending longer: each has its limit, each worker death its back-off."""
        with self._shared.lock:
            pending = len(self._shared.waiting)
        each = self._shared.setup.timeout_s + _GRACE_S
        restarts = self._shared.max_restarts * (self._shared.start_timeout_s + _LONGEST_BACK_OFF_S)
        return _ATTEMPTS * (pending + 1) * each + restarts

    def _overdue(self, futures: Sequence[Future[Score]], limit_s: float) -> RewardError:
        missing = sum(not future.done() for future in futures)
        return RewardError(
            f"verifier pool: {missing} of {len(futures)} samples without a score after "
            f"{limit_s:.0f} s; workers {self.worker_pids}, counts {self.counts}"
        )


def _shut_down(shared: _Shared, threads: Sequence[threading.Thread]) -> None:
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


def _serve(shared: _Shared, index: int, ready: Future[None]) -> None:
    """Body of a pool thread: keep one worker alive and feed it."""
    keeper = _Keeper(shared, index)
    try:
        keeper.start()
        ready.set_result(None)
        while (tasks := shared.batches.get()) is not None:
            keeper.run(tasks)
    except HungUp:
        if not ready.done():
            ready.set_exception(RewardError("the verifier pool was closed"))
    except BaseException as error:
        known = error if isinstance(error, RewardError) else None
        failure = known or RewardError(f"verifier thread {index} failed: {error!r}")
        failure.__cause__ = failure.__cause__ or (None if known else error)
        shared.fail(failure)
        if not ready.done():
            ready.set_exception(failure)
    finally:
        keeper.end()


class _Keeper:
    """Keeps one worker process alive for its thread."""

    __slots__ = ("_deaths", "_index", "_process", "_shared")

    def __init__(self, shared: _Shared, index: int) -> None:
        self._shared = shared
        self._index = index
        self._deaths = 0  # in a row, without a score between
        self._process: WorkerProcess | None = None

    def start(self) -> WorkerProcess:
        """Start a worker, again if it dies on the way. Raises RewardError."""
        shared = self._shared
        while self._process is None:
            path = Path(shared.setup.work_dir, f"worker-{self._index}.stderr")
            try:
                self._process = WorkerProcess(
                    shared.setup, path, shared.start_timeout_s, shared.watch
                )
            except WorkerDied as death:
                self._bury(death, path.read_text(errors="replace")[-4096:].strip())
                continue
            with shared.lock:
                shared.pids[self._index] = self._process.pid
        return self._process

    def run(self, tasks: list[_Task]) -> None:
        """Score the tasks, over as many workers as it takes. Raises RewardError."""
        while tasks := [task for task in tasks if not task.future.done()]:
            if self._shared.closing.is_set():
                return
            process = self.start()
            try:
                self._exchange(process, tasks)
            except WorkerDied as death:
                self._give_up_or_retry(tasks, death)
                self._bury(death, process.stderr_tail())

    def end(self) -> None:
        if self._process is not None:
            self._process.end()
            self._forget()

    def _exchange(self, process: WorkerProcess, tasks: list[_Task]) -> None:
        shared = self._shared
        each = shared.setup.timeout_s + _GRACE_S
        payload = b'{"samples":[' + b",".join(task.encoded for task in tasks) + b"]}"
        process.send(payload, time.monotonic() + each)
        for expected, task in enumerate(tasks):
            reply = process.receive(time.monotonic() + each)
            if reply.index != expected:
                raise WorkerDied(f"it answered sample {reply.index}, not {expected}")
            self._deaths = 0
            shared.finish(task, reply.score, reply.outcome)
            if shared.closing.is_set():
                return

    def _give_up_or_retry(self, tasks: list[_Task], death: WorkerDied) -> None:
        """The sample in hand may have killed the worker: it gets one more try, then none."""
        suspect = next((task for task in tasks if not task.future.done()), None)
        if suspect is None:
            return
        suspect.deaths += 1
        if suspect.deaths >= _ATTEMPTS:
            parts: dict[str, float | None] = dict.fromkeys(self._shared.setup.spec)
            reason = f"verifier worker died ({death})"
            self._shared.finish(suspect, Score(None, parts, None, reason, 0.0), "crashed")

    def _bury(self, death: WorkerDied, stderr: str) -> None:
        """Reap the dead worker; wait before the next, or fail in a crash loop."""
        shared = self._shared
        if self._process is not None:
            self._process.end(graceful=False)
            self._forget()
        self._deaths += 1
        with shared.lock:
            shared.counts.restarts += 1
        if self._deaths > shared.max_restarts:
            raise RewardError(
                f"verifier worker {self._index} died {self._deaths} times in a row ({death}); its "
                f"last words:\n{stderr or '(nothing on stderr)'}"
            )
        if shared.closing.wait(min(_BACK_OFF_S * 2 ** (self._deaths - 1), _LONGEST_BACK_OFF_S)):
            raise HungUp

    def _forget(self) -> None:
        self._process = None
        with self._shared.lock:
            self._shared.pids.pop(self._index, None)


def _settle(future: Future[Score], result: Score | RewardError) -> None:
    # The caller may have cancelled it, in this very moment too.
    with contextlib.suppress(InvalidStateError):
        if isinstance(result, RewardError):
            future.set_exception(result)
        else:
            future.set_result(result)
