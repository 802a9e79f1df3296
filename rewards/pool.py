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
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import msgspec

from rewards.base import RewardError, Sample, Score
from rewards.keeper import GRACE_S, LONGEST_BACK_OFF_S, Child, Keeper, ZygoteDied
from rewards.sandbox import Limits
from rewards.spec import Measurement, check_spec, total
from rewards.wire import Setup, decode, encode, receive, send

# How often a sample may be in hand when the zygote dies before it is given up.
_ATTEMPTS = 2
_REAP_S = 0.25  # how long a child that closed its socket may take to end by itself
_RESULT_LIMIT_BYTES = 1 << 20
_JOIN_S = 20.0


@dataclass(slots=True)
class PoolCounts:
    """What happened since the pool was started, in samples (restarts: of the warm process)."""

    scored: int = 0
    unscored: int = 0
    timeouts: int = 0
    crashes: int = 0
    restarts: int = 0


@dataclass(slots=True)
class _Task:
    """One sample on its way, encoded, and where its score goes."""

    sample: bytes
    future: Future[Score] = field(default_factory=Future)
    deaths: int = 0


class VerifierPool:
    """Scores samples with the rewards of a specification, in `workers` processes at a time.

    spec: names to `{"_target_": import path, "weight": float, **settings}`.
    timeout_s: wall-clock seconds for one sample over all its rewards; then the child that scores it
        is killed and the sample's score is None with reason "timeout".
    batch_size: most samples a child scores before a fresh one takes its place.
    isolated: a fresh child for each sample; model text that runs can then reach no other sample of its batch.
        Costs a few milliseconds a sample.
    sandbox: "strict" or "limits", see `rewards.sandbox`.
    limits: resource limits of a scoring child.
    read_paths: further files and folders a reward may read while it scores.
    start_timeout_s: for the warm process to import the rewards and warm them up.
    max_restarts: the warm process may die so often in a row; then the pool fails.

    All methods may be called from any thread and any event loop. Raises RewardError if the
    specification is wrong or the warm process cannot start or dies in a row.
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
        limits = limits or Limits()
        counts = {"workers": workers, "batch_size": batch_size, "max_restarts": max_restarts, **asdict(limits)}
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
        if sandbox not in ("strict", "limits"):
            raise RewardError(f"sandbox={sandbox!r} is unknown; choose 'strict' or 'limits'")
        if sandbox == "limits":
            warnings.warn(
                "sandbox=limits: model output that a scorer evaluates can write files, open "
                "sockets and start processes; sandbox=strict prevents it",
                RuntimeWarning,
                stacklevel=2,
            )
        plain = check_spec(spec)
        try:
            encode(plain)
        except (TypeError, UnicodeEncodeError) as error:
            raise RewardError(f"reward settings must be plain JSON values: {error}") from error
        self._batch_size = 1 if isolated else batch_size
        cpu_seconds = math.ceil(timeout_s * self._batch_size) + 2
        setup = Setup(plain, cpu_seconds, sandbox, limits, paths, tempfile.mkdtemp(prefix="rewards-"))
        self._scorers = _Scorers(setup, timeout_s, start_timeout_s, max_restarts, workers)
        # Also at interpreter exit and when the pool is dropped unclosed.
        self._finalizer = weakref.finalize(self, self._scorers.close)
        try:
            self._scorers.start()
        except BaseException:
            self.close()
            raise

    async def score(self, samples: Sequence[Sample]) -> list[Score]:
        """Scores in the order of the samples. Raises RewardError, never for a single bad sample."""
        futures, limit_s = self._submit(samples)
        gathered = asyncio.gather(*(asyncio.wrap_future(future) for future in futures))
        try:
            return list(await asyncio.wait_for(gathered, limit_s))
        except TimeoutError:
            raise self._overdue(futures, limit_s) from None

    def score_sync(self, samples: Sequence[Sample]) -> list[Score]:
        """`score` for callers without an event loop."""
        futures, limit_s = self._submit(samples)
        deadline = time.monotonic() + limit_s
        try:
            return [future.result(max(0.0, deadline - time.monotonic())) for future in futures]
        except FutureTimeout:
            raise self._overdue(futures, limit_s) from None

    @property
    def counts(self) -> PoolCounts:
        """A copy of the counters."""
        return replace(self._scorers.counts, restarts=self._scorers.keeper.restarts)

    @property
    def warm_pid(self) -> int | None:
        """Process id of the warm process that forks the scoring children; None while there is none."""
        zygote = self._scorers.keeper.zygote
        return None if zygote is None else zygote.process.pid

    def close(self) -> None:
        """End all processes; samples still waiting fail with RewardError."""
        self._finalizer()

    def __enter__(self) -> VerifierPool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    async def __aenter__(self) -> VerifierPool:
        return self

    async def __aexit__(self, *_: object) -> None:
        await asyncio.to_thread(self.close)

    def _submit(self, samples: Sequence[Sample]) -> tuple[list[Future[Score]], float]:
        """The futures of the scores, and the seconds after which none can be pending."""
        tasks, futures = [], []
        for position, sample in enumerate(samples):
            try:
                tasks.append(_Task(encode(sample)))
                futures.append(tasks[-1].future)
            except UnicodeEncodeError as error:
                # A lone surrogate is the model's or the data's doing; the others go on.
                futures.append(Future())
                futures[-1].set_result(self._scorers.unscored(f"text cannot be encoded as UTF-8: {error}"))
            except TypeError as error:
                raise RewardError(f"sample {position}: metadata must be plain JSON values: {error}") from error
        return futures, self._scorers.submit(tasks, self._batch_size)

    def _overdue(self, futures: Sequence[Future[Score]], limit_s: float) -> RewardError:
        missing = sum(not future.done() for future in futures)
        return RewardError(
            f"verifier pool: {missing} of {len(futures)} samples without a score after {limit_s:.0f} s; {self.counts}"
        )


class _Scorers:
    """The pool's threads, one a scoring child, and what they share. They do not keep the pool itself alive."""

    def __init__(self, setup: Setup, timeout_s: float, start_timeout_s: float, max_restarts: int, workers: int) -> None:
        self._setup = setup
        self._timeout_s = timeout_s
        self._owner = os.getpid()
        self._batches: queue.SimpleQueue[list[_Task] | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._waiting: set[Future[Score]] = set()
        self._failure: RewardError | None = None
        # No pool can wait longer for a warm process: it has its limit, each of its deaths a back-off.
        self._start_limit_s = (max_restarts + 1) * (start_timeout_s + LONGEST_BACK_OFF_S) + GRACE_S
        self._started: Future[None] = Future()
        self._threads = [
            threading.Thread(target=self._serve, name=f"verifier-{index}", daemon=True) for index in range(workers)
        ]
        self.keeper = Keeper(setup, start_timeout_s, max_restarts)
        self.counts = PoolCounts()

    def start(self) -> None:
        """Start the threads; return when the rewards are warm. Raises RewardError."""
        for thread in self._threads:
            thread.start()
        self._started.result(self._start_limit_s)

    def submit(self, tasks: Sequence[_Task], batch_size: int) -> float:
        """Queue the tasks; return the seconds after which none of them can be pending. Raises RewardError."""
        if os.getpid() != self._owner:
            raise RewardError("the verifier pool was made before this process was forked; make one in each")
        with self._lock:
            if self._failure is not None:
                raise self._failure
            self._waiting.update(task.future for task in tasks)
            pending = len(self._waiting)
        for task in tasks:
            task.future.add_done_callback(self._forget)
        # Small jobs spread over the threads too.
        size = min(batch_size, -(-len(tasks) // len(self._threads)) or 1)
        for start in range(0, len(tasks), size):
            self._batches.put(list(tasks[start : start + size]))
        return _ATTEMPTS * (pending + 1) * (self._timeout_s + GRACE_S) + self._start_limit_s

    def close(self) -> None:
        if os.getpid() != self._owner:  # a fork of the owner has no processes to end
            return
        self._fail(RewardError("the verifier pool was closed; make a new one"))
        self.keeper.close()
        for _ in self._threads:
            self._batches.put(None)
        deadline = time.monotonic() + _JOIN_S
        for thread in self._threads:
            if thread.ident is not None and thread is not threading.current_thread():
                thread.join(max(0.0, deadline - time.monotonic()))
        shutil.rmtree(self._setup.work_dir, ignore_errors=True)
        if alive := [thread.name for thread in self._threads if thread.is_alive()]:
            raise RewardError(f"verifier pool: {', '.join(alive)} did not end within {_JOIN_S} s")

    def unscored(self, reason: str, seconds: float = 0.0) -> Score:
        return Score(None, dict.fromkeys(self._setup.spec), None, reason, seconds)

    def _serve(self) -> None:
        """Body of a thread: batch after batch, each in a fresh child."""
        try:
            self.keeper.start()
            with contextlib.suppress(InvalidStateError):  # another thread was first
                self._started.set_result(None)
            while (tasks := self._batches.get()) is not None:
                while tasks := [task for task in tasks if not task.future.done()]:
                    self._score_batch(tasks)
        except BaseException as error:
            failure = error if isinstance(error, RewardError) else RewardError(f"a verifier thread failed: {error!r}")
            self._fail(failure)
            with contextlib.suppress(InvalidStateError):
                self._started.set_exception(failure)

    def _score_batch(self, tasks: Sequence[_Task]) -> None:
        """Score the tasks in one child, as far as it gets. Raises RewardError."""
        in_hand: _Task | None = None
        try:
            child = self.keeper.fork()
            for index, in_hand in enumerate(tasks):
                if not in_hand.future.done() and not self._score(child, index, in_hand):
                    return
            in_hand = None
            self.keeper.end(child)
        except ZygoteDied as death:
            if in_hand is not None:
                in_hand.deaths += 1  # it may have killed the zygote: it gets one more try, then none
                if in_hand.deaths >= _ATTEMPTS:
                    self._give_up(in_hand, f"verifier worker died ({death})", 0.0)

    def _score(self, child: Child, index: int, task: _Task) -> bool:
        """Score one sample; False if that has ended the child. Raises ZygoteDied."""
        started = time.monotonic()
        patience_s = 0.0
        try:
            send(child.socket, b"[%d,%b]" % (index, task.sample), started + self._timeout_s)
            reply = receive(child.socket, _RESULT_LIMIT_BYTES, started + self._timeout_s)
            answered, measured = decode(reply, type=tuple[int, Measurement])
            reason = None if answered == index else "answered out of turn"
        except TimeoutError:
            reason = "timeout"
        except (OSError, EOFError):
            reason, patience_s = "", _REAP_S
        except (msgspec.DecodeError, ValueError, RecursionError):
            reason = "sent a malformed result"
        seconds = time.monotonic() - started
        if reason is None:
            score, parts, why = total(self.keeper.weights, measured)
            self._settle(task, Score(score, parts, measured.answer, why, seconds))
            return True
        ending = self.keeper.end(child, patience_s)
        self._give_up(task, "timeout" if reason == "timeout" else f"verifier {reason or ending}", seconds)
        return False

    def _give_up(self, task: _Task, reason: str, seconds: float) -> None:
        with self._lock:
            self.counts.timeouts += reason == "timeout"
            self.counts.crashes += reason != "timeout"
        self._settle(task, self.unscored(reason, seconds))

    def _settle(self, task: _Task, score: Score) -> None:
        with self._lock:
            self.counts.scored += score.score is not None
            self.counts.unscored += score.score is None
        with contextlib.suppress(InvalidStateError):  # the caller has cancelled it, in this very moment perhaps
            task.future.set_result(score)

    def _forget(self, future: Future[Score]) -> None:
        with self._lock:
            self._waiting.discard(future)

    def _fail(self, error: RewardError) -> None:
        """End all waiting samples with the error, and refuse new ones."""
        with self._lock:
            self._failure = self._failure or error
            waiting, self._waiting = list(self._waiting), set()
        for future in waiting:
            with contextlib.suppress(InvalidStateError):
                future.set_exception(error)
