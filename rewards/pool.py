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
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import asdict, dataclass, replace
from typing import Any

from rewards.base import RewardError, Sample, Score
from rewards.keeper import GONE, MALFORMED, Child, Keeper, ZygoteDied
from rewards.sandbox import Limits
from rewards.spec import Measurement, check_spec, total
from rewards.zygote import Setup, line

# How often a sample may be in hand when the zygote dies before it is given up.
_ATTEMPTS = 2
_REAP_S = 0.25  # how long a child that closed its socket may take to end by itself
_CLOSE_S = 20.0


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
            line(plain)
        except (TypeError, UnicodeEncodeError) as error:
            raise RewardError(f"reward settings must be plain JSON values: {error}") from error
        batch_size = 1 if isolated else batch_size
        work_dir = tempfile.mkdtemp(prefix="rewards-")
        setup = Setup(plain, math.ceil(timeout_s * batch_size) + 2, sandbox, limits, paths, work_dir)
        self._scorer = _Scorer(Keeper(setup, start_timeout_s, max_restarts), timeout_s, batch_size, workers)
        self._names = list(plain)
        self._owner = os.getpid()
        self._loop = asyncio.new_event_loop()
        thread = threading.Thread(target=self._loop.run_forever, name="verifier-pool", daemon=True)
        thread.start()
        # Also at interpreter exit and when the pool is dropped unclosed.
        self._finalizer = weakref.finalize(self, _close, self._owner, self._loop, thread, self._scorer, work_dir)
        try:
            asyncio.run_coroutine_threadsafe(self._scorer.keeper.start(), self._loop).result()
        except BaseException:
            self.close()
            raise

    async def score(self, samples: Sequence[Sample]) -> list[Score]:
        """Scores in the order of the samples. Raises RewardError, never for a single bad sample."""
        return await asyncio.wrap_future(self._submit(samples))

    def score_sync(self, samples: Sequence[Sample]) -> list[Score]:
        """`score` for callers without an event loop."""
        return self._submit(samples).result()

    @property
    def counts(self) -> PoolCounts:
        """A copy of the counters."""
        return replace(self._scorer.counts, restarts=self._scorer.keeper.restarts)

    @property
    def warm_pid(self) -> int | None:
        """Process id of the warm process that forks the scoring children; None while there is none."""
        zygote = self._scorer.keeper.zygote
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

    def _submit(self, samples: Sequence[Sample]) -> Future[list[Score]]:
        if os.getpid() != self._owner:
            raise RewardError("the verifier pool was made before this process was forked; make one in each")
        job = _Job([], [])
        for position, sample in enumerate(samples):
            encoded, score = b"", None
            try:
                encoded = line((position, sample))
            except UnicodeEncodeError as error:  # a lone surrogate is the model's or the data's doing; the others go on
                score = _unscored(self._names, f"text cannot be encoded as UTF-8: {error}")
            except TypeError as error:
                raise RewardError(f"sample {position}: metadata must be plain JSON values: {error}") from error
            job.samples.append(encoded)
            job.scores.append(score)
        with self._scorer.submitting:
            if not self._finalizer.alive:
                raise RewardError("the verifier pool is closed; make a new one")
            return asyncio.run_coroutine_threadsafe(self._scorer.score(job), self._loop)


@dataclass(slots=True)
class _Job:
    """One call's samples, encoded, and their scores as they come; not `wanted` once the caller cancels it."""

    samples: list[bytes]
    scores: list[Score | None]
    wanted: bool = True


class _Scorer:
    """What runs in the pool's own event loop. It does not keep the pool itself alive."""

    def __init__(self, keeper: Keeper, timeout_s: float, batch_size: int, workers: int) -> None:
        self.keeper = keeper
        self.counts = PoolCounts()
        self.submitting = threading.Lock()  # nothing is handed in behind `close`
        self._timeout_s = timeout_s
        self._batch_size = batch_size
        self._workers = workers
        self._free = asyncio.Semaphore(workers)

    async def score(self, job: _Job) -> list[Score]:
        """All scores of a job. Raises RewardError."""
        positions = [position for position, score in enumerate(job.scores) if score is None]
        # Small jobs spread over the workers too.
        size = min(self._batch_size, -(-len(positions) // self._workers) or 1)
        batches = [positions[start : start + size] for start in range(0, len(positions), size)]
        try:
            # Shielded: an exchange with the zygote that is given up halfway would leave it out of step.
            await asyncio.shield(asyncio.gather(*(self._score_batch(job, batch) for batch in batches)))
        except asyncio.CancelledError:
            job.wanted = False
            raise
        return [score for score in job.scores if score is not None]

    async def close(self) -> None:
        """End the zygote; return when all jobs have failed of it."""
        self.keeper.close()
        if others := asyncio.all_tasks() - {asyncio.current_task()}:
            await asyncio.wait(others, timeout=_CLOSE_S)

    async def _score_batch(self, job: _Job, positions: Sequence[int]) -> None:
        """Score some samples of a job, over as many children as it takes. Raises RewardError."""
        deaths: Counter[int] = Counter()
        async with self._free:
            while job.wanted and (left := [position for position in positions if job.scores[position] is None]):
                in_hand = None
                try:
                    child, alive = await self.keeper.fork(), True
                    for position in left:
                        if alive and job.wanted:
                            in_hand = position
                            score, alive = await self._score(child, job.samples[position], position)
                            self._settle(job, position, score)
                    in_hand = None
                    if alive:
                        await self.keeper.end(child)
                except ZygoteDied as death:
                    if in_hand is None:
                        continue
                    deaths[in_hand] += 1  # it may have killed the zygote: it gets one more try, then none
                    if deaths[in_hand] >= _ATTEMPTS:
                        self.counts.crashes += 1
                        self._settle(job, in_hand, self._unscored(f"verifier worker died ({death})"))

    async def _score(self, child: Child, sample: bytes, position: int) -> tuple[Score, bool]:
        """The score of one sample, and whether the child has lived through it. Raises ZygoteDied."""
        started = time.monotonic()
        fault, patience_s = "answered out of turn", 0.0
        try:
            answered, measured = await child.peer.ask(sample, tuple[int, Measurement], self._timeout_s)
            if answered == position:
                score, parts, reason = total(self.keeper.weights, measured)
                return Score(score, parts, measured.answer, reason, time.monotonic() - started), True
        except TimeoutError:
            fault = "timeout"
        except GONE:
            fault, patience_s = "", _REAP_S
        except MALFORMED:
            fault = "sent a malformed result"
        seconds = time.monotonic() - started
        ending = await self.keeper.end(child, patience_s)
        if fault == "timeout":
            self.counts.timeouts += 1
            return self._unscored("timeout", seconds), False
        self.counts.crashes += 1
        return self._unscored(f"verifier {fault or ending}", seconds), False

    def _settle(self, job: _Job, position: int, score: Score) -> None:
        job.scores[position] = score
        self.counts.scored += score.score is not None
        self.counts.unscored += score.score is None

    def _unscored(self, reason: str, seconds: float = 0.0) -> Score:
        return _unscored([weight.name for weight in self.keeper.weights], reason, seconds)


def _unscored(names: Sequence[str], reason: str, seconds: float = 0.0) -> Score:
    return Score(None, dict.fromkeys(names), None, reason, seconds)


def _close(
    owner: int, loop: asyncio.AbstractEventLoop, thread: threading.Thread, scorer: _Scorer, work_dir: str
) -> None:
    if os.getpid() != owner:  # a fork of the owner has no processes to end
        return
    with scorer.submitting:
        closing = asyncio.run_coroutine_threadsafe(scorer.close(), loop)
    closing.result(2 * _CLOSE_S)
    loop.call_soon_threadsafe(loop.stop)
    thread.join(_CLOSE_S)
    loop.close()
    shutil.rmtree(work_dir, ignore_errors=True)
