"""What a learner and a worker do to a buffer, in short."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from rlkit.buffer.payloads import RecordFiles
from rlkit.buffer.protocol import GroupRequest, Lease, Watermark
from rlkit.buffer.sql import SqlBuffer
from rlkit.types import Group, Prompt, Rollout, Verdict, VersionSpan

SERVER: str | None = None  # of PostgreSQL; the fixture `database` sets it
START = Watermark(step=0, version=0, next_ordinal=0, refused=0)


class Clock:
    """Time that moves when told to."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Buffer(SqlBuffer):
    """With what only tests ask for."""

    def submit(self, lease: Lease, rollouts: Sequence[Rollout]) -> None:
        self.submit_many([(lease, rollouts)])

    def score(self, lease: Lease, verdicts: Sequence[Verdict]) -> None:
        self.score_many([(lease, verdicts)])

    def payloads(self) -> int:
        """How many records are stored."""
        if isinstance(self._payloads, RecordFiles):
            return len([*self._payloads._folder.iterdir()])
        with self._db.read() as connection:
            return int(connection.exec_driver_sql("SELECT count(*) FROM payloads").scalar_one())

    def trained_ordinals(self) -> list[int]:
        """The surviving lineage's ledger, in training order."""
        query = "SELECT ordinal FROM groups WHERE state = 'trained' ORDER BY trained_step, ordinal"
        with self._db.read() as connection:
            return list(connection.exec_driver_sql(query).scalars())


def open_at(folder: Path, clock: Clock, *, prompts: int = 2, staleness: int = 1, slice_samples: int = 2) -> Buffer:
    return Buffer(
        SERVER or f"sqlite:///{folder / 'buffer.db'}",
        payload_dir=folder / "payloads",
        prompts_per_step=prompts,
        max_staleness=staleness,
        slice_samples=slice_samples,
        run=hashlib.sha256(str(folder).encode()).hexdigest()[:16],
        clock=clock,
    )


def prompt(ordinal: int) -> Prompt:
    """The prompt of an ordinal, as the learner's pure function of (seed, ordinal)."""
    return Prompt(
        id=f"p{ordinal}",
        text=f"{ordinal} + 1 =",
        token_ids=np.arange(ordinal % 7 + 1),
        reference=str(ordinal + 1),
        metadata={"terms": 2},
    )


def request(buffer: Buffer, count: int, samples: int = 4) -> None:
    first = buffer.stats().next_ordinal
    buffer.request([GroupRequest(ordinal=k, prompt=prompt(k), samples=samples) for k in range(first, first + count)])


def rollout(ordinal: int, index: int, versions: Sequence[int], key: int = 0) -> Rollout:
    """A sample of 2 tokens a version; `key` tells two samples of one place apart."""
    tokens = 2 * len(versions)
    draw = np.random.default_rng((ordinal, index, key))
    return Rollout(
        ordinal=ordinal,
        index=index,
        token_ids=draw.integers(0, 150_000, tokens),
        behavior_logprobs=-draw.exponential(size=tokens).astype(np.float32),
        loss_mask=np.ones(tokens, dtype=np.bool_),
        segments=np.zeros(tokens, dtype=np.int64),
        version_spans=tuple(VersionSpan(version=v, start=2 * i, end=2 * i + 2) for i, v in enumerate(versions)),
        finish_reason="stop",
        engine_id="test",
        text=f"{ordinal}/{index}/{key}",
    )


def rollouts(lease: Lease, versions: Sequence[int] | None = None) -> list[Rollout]:
    spans = [lease.min_version] if versions is None else versions
    return [rollout(lease.ordinal, i, spans, lease.lease_id) for i in range(lease.start, lease.stop)]


def verdicts(lease: Lease) -> list[Verdict]:
    return [Verdict(score=float(i), answer=str(i)) for i in range(lease.start, lease.stop)]


def finish(buffer: Buffer, leases: Iterable[Lease]) -> None:
    """Sample and score leases, with the oldest version they allow."""
    for lease in leases:
        buffer.submit(lease, rollouts(lease))
        buffer.score(lease, verdicts(lease))


def sample_all(buffer: Buffer) -> None:
    """A worker that does all there is to do."""
    while leases := buffer.lease("worker", 64, 60.0):
        finish(buffer, leases)


def train(buffer: Buffer, count: int = 2) -> list[Group]:
    """A learner step on groups that are ready."""
    groups = buffer.take(count)
    assert groups is not None
    buffer.publish(buffer.next_version(), [g.ordinal for g in groups])
    return groups


def same(a: Rollout, b: Rollout) -> bool:
    """Equal bit for bit, dtypes included."""
    for name in Rollout.__slots__:
        x, y = getattr(a, name), getattr(b, name)
        if isinstance(x, np.ndarray):
            if x.dtype != y.dtype or x.tobytes() != y.tobytes():
                return False
        elif x != y:
            return False
    return True
