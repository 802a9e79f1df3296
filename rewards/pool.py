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
from collections import Counter
from collections.abc import Coroutine, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import asdict, dataclass, field, replace
from typing import Any, TypeVar

from rewards.base import RewardError, Sample, Score
from rewards.keeper import GONE, MALFORMED, Child, Keeper, ZygoteDied
from rewards.sandbox import Limits
from rewards.spec import Measurement, check_spec, total
from rewards.zygote import Setup, line

_ATTEMPTS = 2  # how often a sample may be in hand when the zygote dies before it is given up
_REAP_S = 0.25  # how long a child that closed its socket may take to end by itself
_CLOSE_S = 20.0

T = TypeVar("T")


@dataclass(slots=True)
class PoolCounts:
    """What happened since the pool was started, in samples (restarts: of the warm process)."""

    scored: int = 0
    unscored: int = 0
    timeouts: int = 0
    crashes: int = 0
    restarts: int = 0


class VerifierPool:
    """Scores samples with the rewards of a specification, in `workers` processes at a time.

    spec: names to `{"_target_": import path, "weight": float, **settings}`.
    timeout_s: wall-clock seconds for one sample over all its rewards; then the process that scores it is killed and
        the sample's score is None with reason "timeout".
    batch_size: most samples that one process scores. Model text that runs can reach the samples behind it in its
        process: 1 isolates each, for a few milliseconds a sample.
    sandbox, limits: "strict" or "limits", see `rewards.sandbox`, and the resource limits of a process.
    read_paths: further files and folders a reward may read while it scores.

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
        sandbox: str = "strict",
        limits: Limits | None = None,
        read_paths: Sequence[str | os.PathLike[str]] = (),
    ) -> None:
        plain, limits = check_spec(spec), limits or Limits()
        paths = [os.path.abspath(path) for path in read_paths]
        for name, value in {"workers": workers, "batch_size": batch_size, **asdict(limits)}.items():
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise RewardError(f"{name}={value!r} must be a whole number of at least 1")
        if not 0 < timeout_s < math.inf:
            raise RewardError(f"timeout_s={timeout_s!r} must be a finite number of seconds above 0")
        if missing := [path for path in paths if not os.path.exists(path)]:
            raise RewardError(f"read_paths: {missing[0]!r} does not exist")
        if sandbox not in ("strict", "limits"):
            raise RewardError(f"sandbox={sandbox!r} is unknown; choose 'strict' or 'limits'")
        if sandbox == "limits":
            danger = "model output that a scorer evaluates can write files, open sockets and start processes"
            warnings.warn(f"sandbox=limits: {danger}; sandbox=strict prevents it", RuntimeWarning, stacklevel=2)
        folder = tempfile.mkdtemp(prefix="rewards-")
        self._scorer = _Scorer(Setup(plain, workers, batch_size, timeout_s, sandbox, limits, paths, folder))
        # Also at interpreter exit and when the pool is dropped unclosed.
        self._finalizer = weakref.finalize(self, self._scorer.close)
        try:
            self._scorer.submit(self._scorer.start()).result()
        except BaseException:  # raised again: whatever it is, no process stays
            self.close()
            raise

    async def score(self, samples: Sequence[Sample]) -> list[Score]:
        """Scores in the order of the samples. Raises RewardError, never for a single bad sample."""
        return await asyncio.wrap_future(self._scorer.submit(self._scorer.score(samples)))

    def score_sync(self, samples: Sequence[Sample]) -> list[Score]:
        """`score` for callers without an event loop."""
        return self._scorer.submit(self._scorer.score(samples)).result()

    @property
    def counts(self) -> PoolCounts:
        """A copy of the counters."""
        return replace(self._scorer.counts, restarts=self._scorer.keeper.restarts)

    @property
    def warm_pid(self) -> int | None:
        """Process id of the warm process that forks the scoring children; None while there is none."""
        zygote = self._scorer.keeper.zygote
        return None if zygote is None else zygote.process.pid

    @property
    def extracts_answers(self) -> bool:
        """Whether any reward extracts the answers that majority voting counts."""
        return any(weight.answers for weight in self._scorer.keeper.weights)

    def close(self) -> None:
        """End all processes; samples still waiting fail with RewardError."""
        self._finalizer()

    def __enter__(self) -> VerifierPool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@dataclass(slots=True)
class _Job:
    """One call, by the positions of its samples: those still to score, encoded, and the scores of the others."""

    pending: dict[int, bytes] = field(default_factory=dict)
    scores: dict[int, Score] = field(default_factory=dict)


class _Scorer:
    """The pool's thread and event loop, and what runs there. It does not keep the pool itself alive."""

    def __init__(self, setup: Setup) -> None:
        self.keeper = Keeper(setup)
        self.counts = PoolCounts()
        self._setup = setup
        self._free = asyncio.Semaphore(setup.workers)
        self._owner = os.getpid()
        self._closed = False
        self._submitting = threading.Lock()  # nothing is handed in behind `close`
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="verifier-pool", daemon=True)
        self._thread.start()

    def submit(self, work: Coroutine[Any, Any, T]) -> Future[T]:
        """Run it in the pool's loop, from whatever thread. Raises RewardError if the pool is closed."""
        with self._submitting:
            if not self._closed and os.getpid() == self._owner:
                return asyncio.run_coroutine_threadsafe(work, self._loop)
        work.close()
        if self._closed:
            raise RewardError("the verifier pool is closed; make a new one")
        raise RewardError("the verifier pool was made before this process was forked; make one in each")

    def close(self) -> None:
        """End all processes and the thread."""
        if os.getpid() != self._owner:  # a fork of the owner has no processes to end
            return
        ending = self.submit(self._end())
        with self._submitting:
            self._closed = True
        ending.result(2 * _CLOSE_S)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(_CLOSE_S)
        self._loop.close()
        shutil.rmtree(self._setup.work_dir, ignore_errors=True)

    async def _end(self) -> None:
        """End the zygote; return when all work has failed of it."""
        self.keeper.close()
        if others := asyncio.all_tasks() - {asyncio.current_task()}:
            await asyncio.wait(others, timeout=_CLOSE_S)

    async def start(self) -> None:
        """Start the zygote and see that a child can be confined. Raises RewardError."""
        await self.keeper.end(await self.keeper.fork())

    async def score(self, samples: Sequence[Sample]) -> list[Score]:
        """All scores. Raises RewardError."""
        job = _Job()
        for position, sample in enumerate(samples):
            try:
                job.pending[position] = line((position, sample))
            except UnicodeEncodeError as error:  # a lone surrogate is the model's or the data's doing; the others go on
                job.scores[position] = self._unscored(f"text cannot be encoded as UTF-8: {error}")
            except TypeError as error:
                raise RewardError(f"sample {position}: metadata must be plain JSON values: {error}") from error
        order = list(job.pending)
        # Small jobs spread over the workers too.
        size = min(self._setup.batch_size, -(-len(order) // self._setup.workers) or 1)
        batches = [order[start : start + size] for start in range(0, len(order), size)]
        try:
            # Shielded: an exchange with the zygote that is given up halfway would leave it out of step.
            await asyncio.shield(asyncio.gather(*(self._score_batch(job, batch) for batch in batches)))
        except asyncio.CancelledError:
            job.pending.clear()
            raise
        return [job.scores[position] for position in range(len(samples))]

    async def _score_batch(self, job: _Job, positions: Sequence[int]) -> None:
        """Score some samples of a job, by as many children as it takes. Raises RewardError."""
        deaths: Counter[int] = Counter()
        async with self._free:
            while left := [position for position in positions if position in job.pending]:
                in_hand: int | None = None
                child = await self.keeper.fork()
                try:
                    for in_hand in left:
                        if in_hand in job.pending and not await self._score(job, in_hand, child):
                            break
                    else:
                        in_hand = None
                        await self.keeper.end(child)
                except ZygoteDied as death:
                    if in_hand is not None:
                        deaths[in_hand] += 1  # it may have killed the zygote: it gets one more try, then none
                        if deaths[in_hand] >= _ATTEMPTS:
                            self._settle(job, in_hand, self._unscored(f"verifier worker died ({death})"), crashed=True)

    async def _score(self, job: _Job, position: int, child: Child) -> bool:
        """Score one sample; False if that has ended the child. Raises ZygoteDied."""
        started = time.monotonic()
        fault, patience_s = "answered out of turn", 0.0
        try:
            request, kind = job.pending[position], tuple[int, Measurement]
            answered, measured = await child.peer.ask(request, kind, self._setup.timeout_s)
            if answered == position:
                value, parts, reason = total(self.keeper.weights, measured)
                seconds = time.monotonic() - started
                self._settle(job, position, Score(value, parts, measured.answer, reason, seconds))
                return True
        except TimeoutError:
            fault = "timeout"
        except GONE:
            fault, patience_s = "", _REAP_S
        except MALFORMED:
            fault = "sent a malformed result"
        seconds = time.monotonic() - started
        ending = await self.keeper.end(child, patience_s)
        late = fault == "timeout"
        self.counts.timeouts += late
        score = self._unscored(fault if late else f"verifier {fault or ending}", seconds)
        self._settle(job, position, score, crashed=not late)
        return False

    def _settle(self, job: _Job, position: int, score: Score, crashed: bool = False) -> None:
        job.pending.pop(position, None)
        job.scores[position] = score
        self.counts.scored += score.score is not None
        self.counts.unscored += score.score is None
        self.counts.crashes += crashed

    def _unscored(self, reason: str, seconds: float = 0.0) -> Score:
        return Score(None, {weight.name: None for weight in self.keeper.weights}, None, reason, seconds)
