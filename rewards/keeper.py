"""One thread a worker: keeps it alive, feeds it batches, settles their scores."""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from concurrent.futures import Future, InvalidStateError
from dataclasses import dataclass, field
from pathlib import Path

from rewards.base import Score
from rewards.errors import RewardError
from rewards.frames import HungUp
from rewards.process import WorkerDied, WorkerProcess
from rewards.wire import Setup

__all__ = ["ATTEMPTS", "GRACE_S", "LONGEST_BACK_OFF_S", "PoolCounts", "Shared", "Task", "serve"]

# Beyond a sample's own limit: fork, confinement, kill and reaping on a busy machine.
GRACE_S = 15.0
# How often a sample may be in hand when a worker dies before it is given up.
ATTEMPTS = 2
LONGEST_BACK_OFF_S = 5.0
_BACK_OFF_S = 0.1


@dataclass(slots=True)
class PoolCounts:
    """What went wrong since the pool was started, in samples (restarts: in processes)."""

    scored: int = 0
    unscored: int = 0
    timeouts: int = 0
    crashes: int = 0
    restarts: int = 0


@dataclass(slots=True)
class Task:
    """One sample on its way: the frame's part it becomes and where its score goes."""

    encoded: bytes
    future: Future[Score]
    deaths: int = 0


@dataclass(slots=True)
class Shared:
    """What the pool and its threads share; it does not keep the pool itself alive."""

    setup: Setup
    start_timeout_s: float
    max_restarts: int
    owner: int
    watch: int  # a pipe's two ends: a byte into the second wakes every thread out of its wait
    hang_up: int
    batches: queue.SimpleQueue[list[Task] | None] = field(default_factory=queue.SimpleQueue)
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

    def forget(self, future: Future[Score]) -> None:
        """The future is settled or cancelled: nobody waits for it any more."""
        with self.lock:
            self.waiting.discard(future)

    def finish(self, task: Task, score: Score, outcome: str) -> None:
        with self.lock:
            counts = self.counts
            counts.scored += score.score is not None
            counts.unscored += score.score is None
            counts.timeouts += outcome == "timeout"
            counts.crashes += outcome == "crashed"
        _settle(task.future, score)


def serve(shared: Shared, index: int, ready: Future[None]) -> None:
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

    def __init__(self, shared: Shared, index: int) -> None:
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
                self._process = WorkerProcess(shared.setup, path, shared.start_timeout_s, shared.watch)
            except WorkerDied as death:
                self._bury(death, path.read_text(errors="replace")[-4096:].strip())
                continue
            with shared.lock:
                shared.pids[self._index] = self._process.pid
        return self._process

    def run(self, tasks: list[Task]) -> None:
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

    def _exchange(self, process: WorkerProcess, tasks: list[Task]) -> None:
        shared = self._shared
        each = shared.setup.timeout_s + GRACE_S
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

    def _give_up_or_retry(self, tasks: list[Task], death: WorkerDied) -> None:
        """The sample in hand may have killed the worker: it gets one more try, then none."""
        suspect = next((task for task in tasks if not task.future.done()), None)
        if suspect is None:
            return
        suspect.deaths += 1
        if suspect.deaths >= ATTEMPTS:
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
        if shared.closing.wait(min(_BACK_OFF_S * 2 ** (self._deaths - 1), LONGEST_BACK_OFF_S)):
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
