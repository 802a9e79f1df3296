"""The versioned buffer on a SQL database. Every verb is one transaction; misuse raises BufferError.

The terms are in protocol.py. Here are admission and order (request, take, drop, publish), which are the whole of the
staleness bound, as docs/buffer.md proves; leases are in leases.py, checkpoints and rollback in recovery.py.
"""

import math
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, func, insert, select, update

from rlkit.buffer import leases as leasing
from rlkit.buffer import recovery
from rlkit.buffer.codec import check_rollout, decode, encode
from rlkit.buffer.database import Database
from rlkit.buffer.payloads import PayloadRef, SegmentFiles
from rlkit.buffer.protocol import BufferStats, FencedError, GroupRequest, Lease, RollbackReport, Watermark, require
from rlkit.buffer.tables import OPEN, UNENDED, capacity, groups, meta, position, slices, stats_of, update_each, versions
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
        _at_least("prompts_per_step", prompts_per_step, 1)
        _at_least("max_staleness", max_staleness, 0)
        _at_least("slice_samples", slice_samples, 1)
        self._clock = clock
        self._slice_samples = slice_samples
        self._keep_payloads = keep_payloads
        self._db = Database(url, prompts_per_step=prompts_per_step, max_staleness=max_staleness, now=clock())
        self._payloads = SegmentFiles(Path(payload_dir))

    def capacity(self) -> int:
        """How many further ordinals may be requested now (>= 0)."""
        with self._db.read() as connection:
            return capacity(position(connection))

    def request(self, requests: Sequence[GroupRequest]) -> None:
        """Admit groups; ordinals must continue at `next_ordinal` without a gap, within capacity."""
        if not requests:
            return
        for x in requests:
            _at_least("samples", x.samples, 1)
        prompts = [encode(x.prompt, f"metadata of prompt {x.prompt.id}") for x in requests]
        with self._db.write() as connection:
            now = position(connection)
            ordinals = [x.ordinal for x in requests]
            expected = list(range(now.next_ordinal, now.next_ordinal + len(requests)))
            problem, fix = "ordinals must continue without a gap", "request from stats().next_ordinal on"
            require(ordinals == expected, problem, key="ordinals", value=ordinals, expected=str(expected), fix=fix)
            problem, most = "more groups than the staleness bound admits now", f"at most capacity() = {capacity(now)}"
            fix = "wait for the next publish, or raise max_staleness"
            count = len(requests)
            require(count <= capacity(now), problem, key="requests", value=count, expected=most, fix=fix)
            fields = {"state": GroupState.REQUESTED, "min_version": now.version, "requested_at": self._clock()}
            rows = []
            for x, prompt in zip(requests, prompts, strict=True):
                one = {"ordinal": x.ordinal, "samples": x.samples, "prompt_id": x.prompt.id, "prompt": prompt}
                rows.append(fields | one)
            connection.execute(insert(groups), rows)
            waiting = {"state": GroupState.REQUESTED}
            cut = [
                waiting | {"ordinal": x.ordinal, "start": start, "stop": min(start + self._slice_samples, x.samples)}
                for x in requests
                for start in range(0, x.samples, self._slice_samples)
            ]
            connection.execute(insert(slices), cut)
            connection.execute(update(meta).values(next_ordinal=expected[-1] + 1))

    def lease(self, worker_id: str, max_samples: int, timeout_s: float) -> list[Lease]:
        """Lease slices of the lowest ordinals, at most `max_samples` samples in all; [] if none.

        A slice is never larger than `slice_samples`, and one larger than `max_samples` is split. Expired leases are
        reclaimed first.
        """
        _at_least("max_samples", max_samples, 1)
        _positive(timeout_s)
        with self._db.read() as connection:
            if not leasing.anything_to_lease(connection, self._clock()):
                return []  # an idle worker's poll does not wait for the writers
        with self._db.write() as connection:
            now = self._clock()  # not before the lock is held: waiting for it takes time
            leasing.reclaim_expired(connection, now)
            return leasing.lease_slices(connection, worker_id, max_samples, now + timeout_s)

    def renew(self, leases: Sequence[Lease], timeout_s: float) -> list[Lease]:
        """Extend the deadlines; a lost lease raises FencedError, the others are extended."""
        _positive(timeout_s)
        with self._fencing() as (connection, lost):
            deadline = self._clock() + timeout_s
            lost += leasing.renew(connection, leases, deadline)
        return [replace(x, deadline=deadline) for x in leases]

    def submit_many(self, work: Sequence[tuple[Lease, Sequence[Rollout]]]) -> None:
        """Store the rollouts of slices (GENERATED); lost leases raise FencedError after the rest is stored."""
        encoded = []
        for lease, rollouts in work:
            ordered = sorted(rollouts, key=lambda x: x.index)
            leasing.check_covers(lease, "rollouts", [(x.ordinal, x.index) for x in ordered])
            for x in ordered:
                check_rollout(x)
            spanned = {span.version for x in ordered for span in x.version_spans}
            encoded.append((lease, encode(ordered, "rollouts"), spanned or {lease.min_version}))
        with self._fencing() as (connection, lost):
            lost += leasing.submit(connection, encoded, self._payloads)

    def score_many(self, work: Sequence[tuple[Lease, Sequence[Verdict]]]) -> None:
        """Store the verdicts of slices, in order of sample index; a group is SCORED once all its slices are.

        Lost leases raise FencedError after the rest is stored.
        """
        problem, fix = (
            "a verdict's score must be a finite number or None",
            "let the verifier answer Verdict(score=None)",
        )
        encoded = []
        for lease, verdicts in work:
            leasing.check_covers(lease, "verdicts", [(lease.ordinal, lease.start + i) for i in range(len(verdicts))])
            for x in verdicts:
                require(x.score is None or math.isfinite(x.score), problem, key="score", value=x.score, fix=fix)
            encoded.append((lease, encode(verdicts, "verdicts")))
        with self._fencing() as (connection, lost):
            lost += leasing.score(connection, encoded, self._clock())

    def release(self, leases: Sequence[Lease]) -> None:
        """Give leases back: unfinished slices are REQUESTED again, lost leases passed over."""
        with self._db.write() as connection:
            leasing.release(connection, leases)

    def take(self, count: int) -> list[Group] | None:
        """The `count` lowest open ordinals as TAKEN, or None while any of them is not SCORED."""
        _at_least("count", count, 1)
        with self._db.read() as connection:
            if _lowest_open(connection, count) is None:
                return None  # the learner's poll does not wait for the writers
        with self._db.write() as connection:
            rows = _lowest_open(connection, count)
            if rows is None:
                return None
            ordinals = [row.ordinal for row in rows]
            parts: dict[int, list[Any]] = {ordinal: [] for ordinal in ordinals}
            query = select(slices).where(slices.c.ordinal.in_(ordinals)).order_by(slices.c.ordinal, slices.c.start)
            for part in connection.execute(query):
                parts[part.ordinal].append(part)
            taken = [self._load(row, parts[row.ordinal]) for row in rows]
            for group in taken:
                pairs = zip(group.rollouts, group.verdicts, strict=True)
                known = encode([(v.score, len(r.token_ids)) for r, v in pairs if v.score is not None], "scores")
                update_each(connection, groups, [group.ordinal], state=GroupState.TAKEN, outcomes=known)
        return taken

    def drop(self, ordinals: Sequence[int], reason: str) -> None:
        """Refuse groups, open or taken (DROPPED): their leases are void, and each raises the admission bound by one."""
        require(bool(reason), "a drop needs a reason", key="reason", value=reason)
        with self._db.write() as connection:
            _check_states(connection, ordinals, UNENDED, "dropped")
            update_each(connection, groups, ordinals, state=GroupState.DROPPED, drop_reason=reason)
            leasing.void(connection, ordinals)
            connection.execute(update(meta).values(refused=meta.c.refused + len(ordinals)))

    def publish(self, version: int, trained: Sequence[int]) -> None:
        """TAKEN groups `trained` become TRAINED by the step that made `version`; step += 1.

        `trained` must be all TAKEN groups and exactly P of them: without that the staleness bound does not hold. A
        taken group not to be trained on is dropped first, and replaced.
        """
        with self._db.write() as connection:
            now = position(connection)
            _at_least("version", version, now.next_version)
            _check_states(connection, trained, (GroupState.TAKEN,), "trained")
            query = select(groups.c.ordinal).where(groups.c.state == GroupState.TAKEN)
            left = sorted(set(connection.execute(query).scalars()) - set(trained))
            problem = "a step trains on every taken group, prompts_per_step of them"
            value, expected = f"{len(trained)} groups; taken besides: {left}", f"all taken: {now.prompts_per_step}"
            fix = "drop the groups the step leaves out and take as many again"
            whole = not left and len(trained) == now.prompts_per_step
            require(whole, problem, key="trained", value=value, expected=expected, fix=fix)
            update_each(connection, groups, trained, state=GroupState.TRAINED, trained_step=now.step)
            step = now.step + 1
            connection.execute(insert(versions).values(version=version, step=step, published_at=self._clock()))
            connection.execute(update(meta).values(step=step, version=version, next_version=version + 1))

    def history(self, prompt_ids: Collection[str], latest: int) -> dict[str, list[list[tuple[float, int]]]]:
        """(score, tokens) of the scored samples of each prompt's `latest` groups, newest first; no group: left out.

        Groups that were taken, those `commit` forgot included: the answer depends on what the learner did in the
        surviving lineage, not on how far the workers are.
        """
        age = func.row_number().over(partition_by=groups.c.prompt_id, order_by=groups.c.ordinal.desc()).label("age")
        taken = groups.c.prompt_id.in_(prompt_ids) & groups.c.outcomes.is_not(None)
        part = select(groups.c.prompt_id, groups.c.outcomes, age).where(taken).subquery()
        found: dict[str, list[list[tuple[float, int]]]] = {}
        with self._db.read() as connection:
            for name, outcomes, _ in connection.execute(select(part).where(part.c.age <= latest).order_by(part.c.age)):
                found.setdefault(name, []).append(decode(outcomes, list[tuple[float, int]]))
        return found

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

    def stats(self) -> BufferStats:
        """Counters for telemetry and `rlkit buffer`."""
        with self._db.read() as connection:
            return stats_of(connection)

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


def _at_least(key: str, value: int, least: int) -> None:
    whole = isinstance(value, int) and not isinstance(value, bool)
    require(whole and value >= least, f"{key} is out of range", key=key, value=value, expected=f">= {least}")


def _positive(timeout_s: float) -> None:
    right = 0 < timeout_s < math.inf
    require(right, "timeout_s is out of range", key="timeout_s", value=timeout_s, expected="> 0 seconds")


def _lowest_open(connection: Connection, count: int) -> list[Any] | None:
    """Group rows of the `count` lowest open ordinals, or None unless all of them are scored."""
    query = select(groups).where(groups.c.state.in_(OPEN)).order_by(groups.c.ordinal)
    rows = connection.execute(query.limit(count)).all()
    ready = len(rows) == count and all(row.state == GroupState.SCORED for row in rows)
    return list(rows) if ready else None


def _check_states(connection: Connection, ordinals: Sequence[int], states: Collection[GroupState], verb: str) -> None:
    """BufferError unless all groups exist, are named once and are in one of `states`."""
    require(len(set(ordinals)) == len(ordinals), "named twice", key="ordinals", value=list(ordinals))
    query = select(groups.c.ordinal, groups.c.state).where(groups.c.ordinal.in_(ordinals))
    found = {ordinal: str(state) for ordinal, state in connection.execute(query)}
    wrong = {x: found.get(x, "never requested") for x in ordinals if found.get(x) not in states}
    problem, expected = f"these groups cannot be {verb} now", " or ".join(states)
    require(not wrong, problem, key="ordinals", value=wrong, expected=expected)
