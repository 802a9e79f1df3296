"""The versioned buffer on a SQL database. Every verb is one transaction; misuse raises BufferError.

The terms are in protocol.py. What a verb does is in admission.py (request, take, drop, publish), leases.py (lease
to score) and recovery.py (watermark, commit, rollback); here is what happens around the transaction.
"""

import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, func, select, update

from rlkit.buffer import admission, recovery
from rlkit.buffer import leases as leasing
from rlkit.buffer.checks import at_least, covers, distinct, positive
from rlkit.buffer.codec import check_rollout, check_verdict, decode, encode
from rlkit.buffer.database import Database
from rlkit.buffer.payloads import PayloadRef, SegmentFiles
from rlkit.buffer.protocol import BufferStats, FencedError, GroupRequest, Lease, RollbackReport, Watermark, require
from rlkit.buffer.tables import groups, meta, position, update_each, versions
from rlkit.types import Group, GroupState, Prompt, Rollout, Verdict


class SqlBuffer:
    """What learner and rollout workers rely on. Any number of processes use one database; each opens its own.

    Args:
        url: sqlite:///path.
        payload_dir: folder of the payload segments; the same for every process.
        prompts_per_step, max_staleness: P and S of the admission bound; fixed for a database's life.
        slice_samples: largest slice of the groups this process requests.
        clock: unix seconds; it decides when a lease has expired.
        keep_payloads: let `commit` remove nothing.

    Raises BufferError for a setting out of range, or see Database.
    """

    def __init__(
        self,
        url: str,
        *,
        payload_dir: str | Path,
        prompts_per_step: int,
        max_staleness: int,
        slice_samples: int,
        clock: Callable[[], float] = time.time,
        keep_payloads: bool = False,
    ) -> None:
        at_least("prompts_per_step", prompts_per_step, 1)
        at_least("max_staleness", max_staleness, 0)
        at_least("slice_samples", slice_samples, 1)
        self._clock = clock
        self._slice_samples = slice_samples
        self._keep_payloads = keep_payloads
        self._db = Database(url, prompts_per_step=prompts_per_step, max_staleness=max_staleness, now=clock())
        self._payloads = SegmentFiles(Path(payload_dir))

    def capacity(self) -> int:
        """How many further ordinals may be requested now (>= 0)."""
        with self._db.read() as connection:
            return admission.capacity(position(connection))

    def request(self, requests: Sequence[GroupRequest]) -> None:
        """Admit groups; ordinals must continue at `next_ordinal` without a gap, within capacity."""
        if not requests:
            return
        for x in requests:
            at_least("samples", x.samples, 1)
        prompts = [encode(x.prompt, f"metadata of prompt {x.prompt.id}") for x in requests]
        with self._db.write() as connection:
            admission.request(connection, requests, prompts, self._slice_samples, self._clock())

    def lease(self, worker_id: str, max_samples: int, timeout_s: float) -> list[Lease]:
        """Lease slices of the lowest ordinals, at most `max_samples` samples in all; [] if none.

        A slice is never larger than `slice_samples`, and one larger than `max_samples` is split. Expired leases are
        reclaimed first.
        """
        at_least("max_samples", max_samples, 1)
        positive("timeout_s", timeout_s)
        with self._db.read() as connection:
            if not leasing.anything_to_lease(connection, self._clock()):
                return []  # an idle worker's poll does not wait for the writers
        with self._db.write() as connection:
            now = self._clock()  # not before the lock is held: waiting for it takes time
            leasing.reclaim_expired(connection, now)
            return leasing.lease_slices(connection, worker_id, max_samples, now + timeout_s)

    def renew(self, leases: Sequence[Lease], timeout_s: float) -> list[Lease]:
        """Extend the deadlines; a lost lease raises FencedError, the others are extended."""
        positive("timeout_s", timeout_s)
        with self._fencing() as (connection, lost):
            deadline = self._clock() + timeout_s
            lost += leasing.renew(connection, leases, deadline)
        return [replace(x, deadline=deadline) for x in leases]

    def submit(self, lease: Lease, rollouts: Sequence[Rollout]) -> None:
        """Store a slice's rollouts (GENERATED). FencedError if the lease is not the newest."""
        self.submit_many([(lease, rollouts)])

    def submit_many(self, work: Sequence[tuple[Lease, Sequence[Rollout]]]) -> None:
        """`submit` of several slices at once; lost leases raise after the rest is stored."""
        distinct("leases", [lease.lease_id for lease, _ in work])
        encoded = []
        for lease, rollouts in work:
            ordered = sorted(rollouts, key=lambda x: x.index)
            covers(lease, "rollouts", [(x.ordinal, x.index) for x in ordered])
            for x in ordered:
                check_rollout(x)
            spanned = {span.version for x in ordered for span in x.version_spans}
            encoded.append((lease, encode(ordered, "rollouts"), spanned or {lease.min_version}))
        with self._fencing() as (connection, lost):
            lost += leasing.submit(connection, encoded, self._payloads)

    def score(self, lease: Lease, verdicts: Sequence[Verdict]) -> None:
        """Store a slice's verdicts, in order of sample index; the group is SCORED once all are."""
        self.score_many([(lease, verdicts)])

    def score_many(self, work: Sequence[tuple[Lease, Sequence[Verdict]]]) -> None:
        """`score` of several slices at once; lost leases raise after the rest is stored."""
        distinct("leases", [lease.lease_id for lease, _ in work])
        encoded = []
        for lease, verdicts in work:
            covers(lease, "verdicts", [(lease.ordinal, lease.start + i) for i in range(len(verdicts))])
            for x in verdicts:
                check_verdict(x)
            encoded.append((lease, encode(verdicts, "verdicts")))
        with self._fencing() as (connection, lost):
            lost += leasing.score(connection, encoded, self._clock())

    def release(self, leases: Sequence[Lease]) -> None:
        """Give leases back: unfinished slices are REQUESTED again, lost leases passed over."""
        with self._db.write() as connection:
            leasing.release(connection, leases)

    def take(self, count: int) -> list[Group] | None:
        """The `count` lowest open ordinals as TAKEN, or None while any of them is not SCORED."""
        at_least("count", count, 1)
        with self._db.read() as connection:
            if admission.lowest_open(connection, count) is None:
                return None  # the learner's poll does not wait for the writers
        with self._db.write() as connection:
            rows = admission.lowest_open(connection, count)
            if rows is None:
                return None
            ordinals = [row.ordinal for row in rows]
            parts = admission.slices_of(connection, ordinals)
            taken = [self._load(row, parts[row.ordinal]) for row in rows]
            update_each(connection, groups, ordinals, state=GroupState.TAKEN)
        return taken

    def drop(self, ordinals: Sequence[int], reason: str) -> None:
        """Refuse groups (DROPPED): each raises the admission bound by one."""
        require(bool(reason), "a drop needs a reason", key="reason", value=reason)
        if ordinals:
            with self._db.write() as connection:
                admission.drop(connection, ordinals, reason)

    def publish(self, version: int, trained: Sequence[int]) -> None:
        """TAKEN groups `trained` become TRAINED by the step that made `version`; step += 1.

        `trained` must be all TAKEN groups and exactly P of them: without that the staleness bound does not hold. A
        taken group not to be trained on is dropped first, and replaced.
        """
        with self._db.write() as connection:
            admission.publish(connection, version, trained, self._clock)

    def watermark(self) -> Watermark:
        """State to write into a checkpoint."""
        with self._db.read() as connection:
            return recovery.current_watermark(connection)

    def commit(self, watermark: Watermark) -> None:
        """The checkpoint is on disk: payloads of groups it covers may be removed."""
        with self._db.write() as connection:
            recovery.commit(connection, watermark, self._payloads, self._keep_payloads)

    def rollback(self, watermark: Watermark) -> RollbackReport:
        """Resume from a checkpoint: undo what was trained, taken or dropped after it.

        Such groups return to SCORED if all their tokens' versions survive, else they are requested again under the
        same ordinal. Every lease is void. Requests beyond the admission bound are removed. Also right for an empty
        database (the run folder lost its buffer) and for one that is behind the checkpoint (power loss); the ledger
        then begins at the checkpoint. Without a checkpoint: Watermark(step=0, version=0, next_ordinal=0, refused=0).
        """
        with self._db.write() as connection:
            return recovery.rollback(connection, watermark, self._payloads, self._clock())

    def next_version(self) -> int:
        """Smallest version id never used, dead lineages included."""
        with self._db.read() as connection:
            return int(position(connection).next_version)

    def steps_of(self, wanted: Collection[int]) -> dict[int, int]:
        """Step of each version: lag is a difference of steps, as version ids skip after a rollback."""
        query = select(versions.c.version, versions.c.step).where(versions.c.version.in_(wanted))
        with self._db.read() as connection:
            return {version: step for version, step in connection.execute(query)}

    def trained_ordinals(self) -> list[int]:
        """Ledger: ordinals trained in the surviving lineage, in training order."""
        query = select(groups.c.ordinal).where(groups.c.state == GroupState.TRAINED)
        with self._db.read() as connection:
            return list(connection.execute(query.order_by(groups.c.trained_step, groups.c.ordinal)).scalars())

    def stats(self) -> BufferStats:
        """Counters for telemetry and `rlkit buffer`."""
        with self._db.read() as connection:
            return read_stats(connection)

    def close(self) -> None:
        """Release files and connections."""
        self._payloads.close()
        self._db.close()

    @contextmanager
    def _fencing(self) -> Iterator[tuple[Connection, list[Lease]]]:
        """A write that gathers its lost leases; they raise after it: what the others wrote is kept, the count too."""
        lost: list[Lease] = []
        with self._db.write() as connection:
            yield connection, lost
            if lost:
                connection.execute(update(meta).values(fenced_writes=meta.c.fenced_writes + len(lost)))
        if lost:
            raise FencedError(lost)

    def _load(self, row: Any, parts: Sequence[Any]) -> Group:
        stored = [self._payloads.read(PayloadRef(x.segment, x.offset, x.length)) for x in parts]
        rollouts = tuple(rollout for record in stored for rollout in decode(record, list[Rollout]))
        verdicts = tuple(verdict for x in parts for verdict in decode(x.verdicts, list[Verdict]))
        prompt = decode(row.prompt, Prompt)
        return Group(ordinal=row.ordinal, prompt=prompt, samples=row.samples, rollouts=rollouts, verdicts=verdicts)


def read_stats(connection: Connection) -> BufferStats:
    """Counts of a snapshot."""
    now = position(connection)
    by_state = select(groups.c.state, func.count()).group_by(groups.c.state)
    by_reason = select(groups.c.drop_reason, func.count()).where(groups.c.state == GroupState.DROPPED)
    states = {state: count for state, count in connection.execute(by_state)}
    counters = ("step", "version", "next_ordinal", "expired_leases", "fenced_writes")
    return BufferStats(
        states={str(state): states.get(state, 0) for state in GroupState},
        dropped_reasons={reason: n for reason, n in connection.execute(by_reason.group_by(groups.c.drop_reason))},
        **{name: getattr(now, name) for name in counters},
    )
