"""The verifier pool: scores samples in killable, confined processes, with a deadline on each."""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import math
import os
import queue
import shutil
import tempfile
import threading
import time
import warnings
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from typing import Any

from rewards.base import RewardError, Sample, Score
from rewards.keeper import GONE, MALFORMED, Child, Keeper, ZygoteDied
from rewards.spec import Measurement, check_spec, total
from rewards.zygote import Setup, line

_ATTEMPTS = 2  # how often a sample may be in hand when the zygote dies before it is given up
_REAP_S = 0.25  # how long a child that closed its socket may take to end by itself
_CLOSE_S = 20.0

Scores = Future[list[Score]]


class VerifierPool(contextlib.AbstractContextManager["VerifierPool"]):
    """Scores samples with the rewards of a specification, in `workers` processes at a time.

    spec: names to `{"_target_": import path, "weight": float, **settings}`; timeout_s: wall-clock seconds for one
    sample over all its rewards; batch_size: most samples that one process scores, of however many calls; sandbox:
    "strict" or "limits", see `rewards.sandbox`; memory_mb: address space of a scoring process, in MiB beyond what the
    warm process already maps.

    All methods may be called from any thread and any event loop. Raises RewardError if the specification is wrong or
    the warm process cannot start or dies in a row. Close it, or use `with`; at interpreter exit it closes itself.
    """

    def __init__(
        self, spec: Mapping[str, Any], workers: int = 2, timeout_s: float = 5.0, *,
        batch_size: int = 32, sandbox: str = "strict", memory_mb: int = 1024,
    ) -> None:  # fmt: skip
        plain = check_spec(spec)
        for name, value in {"workers": workers, "batch_size": batch_size, "memory_mb": memory_mb}.items():
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise RewardError(f"{name}={value!r} must be a whole number of at least 1")
        if not 0 < timeout_s < math.inf:
            raise RewardError(f"timeout_s={timeout_s!r} must be a finite number of seconds above 0")
        if sandbox not in ("strict", "limits"):
            raise RewardError(f"sandbox={sandbox!r} is unknown; choose 'strict' or 'limits'")
        if sandbox == "limits":
            danger = "model output that a scorer evaluates can write files, open sockets and start processes"
            warnings.warn(f"sandbox=limits: {danger}; sandbox=strict prevents it", RuntimeWarning, stacklevel=2)
        self._workers, self._timeout_s, self._batch_size = workers, timeout_s, batch_size
        self._folder = tempfile.mkdtemp(prefix="rewards-")
        cpu_seconds = math.ceil(timeout_s * batch_size) + 2
        self._keeper = Keeper(Setup(plain, cpu_seconds, memory_mb, sandbox, self._folder))
        self._owner = os.getpid()
        self._closed = False
        self._handing_in = threading.Lock()  # nothing is handed in behind `close`
        self._batches: queue.SimpleQueue[tuple[Scores, list[bytes | Score]] | None] = queue.SimpleQueue()
        # Daemons, since the interpreter would wait for others before it lets the pool close itself.
        self._threads = [threading.Thread(target=self._work, name="verifier", daemon=True) for _ in range(workers)]
        for thread in self._threads:
            thread.start()
        atexit.register(self.close)
        try:
            self._hand_in([[]])[0].result()  # see that a child can be had
        except BaseException:  # raised again: whatever it is, no process stays
            self.close()
            raise

    async def score(self, samples: Sequence[Sample]) -> list[Score]:
        """Scores in the order of the samples. Raises RewardError, never for a single bad sample."""
        batches = await asyncio.gather(*map(asyncio.wrap_future, self._submit(samples)))
        return [score for batch in batches for score in batch]

    def score_sync(self, samples: Sequence[Sample]) -> list[Score]:
        """`score` for callers without an event loop."""
        return [score for batch in self._submit(samples) for score in batch.result()]

    @property
    def restarts(self) -> int:
        """How often the warm process has died and was replaced."""
        return self._keeper.restarts

    @property
    def extracts_answers(self) -> bool:
        """Whether any reward extracts the answers that majority voting counts."""
        return any(weight.answers for weight in self._keeper.weights)

    def close(self) -> None:
        """End all processes; samples still waiting fail with RewardError."""
        if os.getpid() != self._owner:  # a fork of the owner has no processes to end
            return
        with self._handing_in:
            self._closed = True
        self._keeper.close()
        for _ in self._threads:
            self._batches.put(None)
        for thread in self._threads:
            thread.join(_CLOSE_S)
        shutil.rmtree(self._folder, ignore_errors=True)
        atexit.unregister(self.close)

    def __exit__(self, *_: object) -> None:
        self.close()

    def _submit(self, samples: Sequence[Sample]) -> list[Scores]:
        """The scores to come, in batches of neighbours. Raises RewardError."""
        # Few samples spread over the workers too.
        size = min(self._batch_size, -(-len(samples) // self._workers) or 1)
        entries: list[bytes | Score] = []
        for position, sample in enumerate(samples):
            try:
                entries.append(line((position % size, sample)))
            except UnicodeEncodeError as error:  # a lone surrogate is the model's or the data's doing; the others go on
                entries.append(self._unscored(f"text cannot be encoded as UTF-8: {error}"))
            except TypeError as error:
                raise RewardError(f"sample {position}: metadata must be plain JSON values: {error}") from error
        return self._hand_in([entries[start : start + size] for start in range(0, len(entries), size)])

    def _hand_in(self, batches: list[list[bytes | Score]]) -> list[Scores]:
        if os.getpid() != self._owner:
            raise RewardError("the verifier pool was made before this process was forked; make one in each")
        with self._handing_in:
            if self._closed:
                raise RewardError("the verifier pool is closed; make a new one")
            futures = [Scores() for _ in batches]
            for handed_in in zip(futures, batches, strict=True):
                self._batches.put(handed_in)
        return futures

    def _work(self) -> None:
        """A thread's life. The kernel ends a zygote with the thread that started it, so all live until `close`."""
        child: Child | None = None
        while (handed_in := self._batches.get()) is not None:
            future, batch = handed_in
            try:
                child, scores = self._score_batch(batch, future, child)
            except BaseException as error:  # raised again where the scores are waited for
                if future.set_running_or_notify_cancel():
                    future.set_exception(error)
            else:
                if future.set_running_or_notify_cancel():
                    future.set_result(scores)
        if child is not None:
            child.socket.close()

    def _score_batch(
        self, batch: list[bytes | Score], future: Scores, child: Child | None
    ) -> tuple[Child | None, list[Score]]:
        """Score a batch, until it is cancelled, by `child` and others as it takes; with the one that can go on.

        Raises RewardError.
        """
        scores: list[Score] = []
        deaths = 0  # of zygotes with the next sample in hand: it may have killed them
        # An empty batch asks for a child and nothing else.
        while not future.cancelled() and (len(scores) < len(batch) or not (batch or child)):
            try:
                if child is None or not child.alive or child.zygote is not self._keeper.zygote:
                    child = None
                    child = self._keeper.fork()
                if len(scores) < len(batch):
                    entry = batch[len(scores)]
                    scores.append(entry if isinstance(entry, Score) else self._score(child, len(scores), entry))
                    deaths, child.served = 0, child.served + 1
                if child.alive and child.served >= self._batch_size:
                    spent, child = child, None
                    self._keeper.end(spent)
            except ZygoteDied as death:
                deaths += child is not None and len(scores) < len(batch)
                child = None
                if deaths >= _ATTEMPTS:
                    scores.append(self._unscored(f"verifier worker died ({death})"))
                    deaths = 0
        return child, scores

    def _score(self, child: Child, position: int, request: bytes) -> Score:
        """Score one sample; the child is ended if it does not do as it should. Raises ZygoteDied."""
        started = time.monotonic()
        fault, patience_s = "verifier answered out of turn", 0.0
        try:
            answered, measured = child.ask(request, tuple[int, Measurement], self._timeout_s)
            if answered == position:
                value, parts, reason = total(self._keeper.weights, measured)
                return Score(value, parts, measured.answer, reason, time.monotonic() - started)
        except TimeoutError:
            fault = "timeout"
        except GONE:
            fault, patience_s = "", _REAP_S
        except MALFORMED:
            fault = "verifier sent a malformed result"
        seconds = time.monotonic() - started
        ending = self._keeper.end(child, patience_s)
        return self._unscored(fault or f"verifier {ending}", seconds)

    def _unscored(self, reason: str, seconds: float = 0.0) -> Score:
        return Score(None, {weight.name: None for weight in self._keeper.weights}, None, reason, seconds)
