"""The workers' side of the buffer: leases of slices, and what is handed in under them."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from numbers import Real
from operator import attrgetter
from typing import Any

from sqlalchemy import BigInteger, Connection, Float, bindparam, case, cast, func, insert, select, update

from rlkit.buffer.database import Database
from rlkit.buffer.payloads import RecordFiles, RecordRows, check_rollout, decode, encode
from rlkit.buffer.protocol import FencedError, Lease, at_least, require
from rlkit.buffer.tables import IN_WORK, UNLEASED, groups, meta, position, slices, versions
from rlkit.types import GroupState, Prompt, Rollout, Verdict

_PRECEDENCE = (GroupState.LEASED, GroupState.REQUESTED, GroupState.GENERATED, GroupState.SCORED)
"""A group is leased while any slice is, requested while any waits, scored once all are."""

# statements of the busy verbs, built once: building one costs more than running it
_SLICE = (slices.c.ordinal == bindparam("at_ordinal")) & (slices.c.start == bindparam("at_start"))
_UPDATE_SLICE = update(slices).where(_SLICE)
_HELD = select(slices).where(slices.c.lease_id.in_(bindparam("ids", expanding=True)))
_LIVE = select(versions.c.version).where(versions.c.live, versions.c.version.in_(bindparam("spanned", expanding=True)))
_WAITING = slices.c.state == GroupState.REQUESTED
_EXPIRED = slices.c.state.in_(IN_WORK) & (slices.c.deadline <= bindparam("now"))
_ANY_VERSION = 2**63 - 1
_NEWEST = bindparam("newest", type_=BigInteger)  # version of the engine that is to sample
_ALIVE = select(versions.c.version).where(versions.c.live, versions.c.version == _NEWEST).exists()
_READY = _WAITING & (groups.c.min_version <= _NEWEST) & (_ALIVE | (_NEWEST == _ANY_VERSION))
_ANY = select(slices.c.ordinal).join(groups).where(_READY | _EXPIRED).limit(1)
_GONE = select(slices.c.ordinal, slices.c.start).where(_EXPIRED)
_TO_LEASE = select(slices, groups.c.prompt, groups.c.min_version).join(groups).where(_READY)
_TO_LEASE = _TO_LEASE.order_by(slices.c.ordinal, slices.c.start).limit(bindparam("most"))
_RANK = func.min(case({x: i for i, x in enumerate(_PRECEDENCE)}, value=slices.c.state)).label("rank")
_FOUND = select(slices.c.ordinal, _RANK, func.min(slices.c.oldest_version).label("oldest"))
_FOUND = _FOUND.where(slices.c.ordinal.in_(bindparam("ordinals", expanding=True))).group_by(slices.c.ordinal)
_NOW = _FOUND.subquery().c
_SCORED = _NOW.rank == _PRECEDENCE.index(GroupState.SCORED)
_FOLLOW = update(groups).where(groups.c.ordinal == _NOW.ordinal).values(
    state=case(dict(enumerate(_PRECEDENCE)), value=_NOW.rank), oldest_version=case((_SCORED, _NOW.oldest)),
    scored_at=case((_SCORED, cast(bindparam("now"), Float))),
)  # fmt: skip


class Leases:
    """Verbs of the workers; SqlBuffer adds the learner's."""

    _db: Database
    _payloads: RecordFiles | RecordRows
    _clock: Callable[[], float]

    def lease(self, worker_id: str, max_samples: int, timeout_s: float, version: int | None = None) -> list[Lease]:
        """Reclaim expired leases, then lease slices of the lowest ordinals; [] if none.

        At most `max_samples` samples in all: a slice larger than that is split. With `version`, that of the engine,
        only slices that ask for no newer one, and none if a rollback has left it behind.
        """
        newest = _ANY_VERSION if version is None else version
        at_least("max_samples", max_samples, 1)
        at_least("timeout_s", timeout_s, 0.001, Real)
        with self._db.read() as connection:
            if connection.execute(_ANY, {"now": self._clock(), "newest": newest}).first() is None:
                return []  # an idle worker's poll does not wait for the writers
        with self._db.write() as connection:
            now = self._clock()  # not before the lock is held: waiting for it takes time
            expired = connection.execute(_GONE, {"now": now}).all()
            _give_back(connection, expired)
            first, left = position(connection).next_lease, max_samples
            leases: list[Lease] = []
            for row in connection.execute(_TO_LEASE, {"newest": newest, "most": left}).all():
                stop = min(row.stop, row.start + left)
                if stop < row.stop:
                    if leases:
                        break
                    rest = {"ordinal": row.ordinal, "start": stop, "stop": row.stop, "epoch": row.epoch}
                    connection.execute(_UPDATE_SLICE, [_at(row) | {"stop": stop}])
                    connection.execute(insert(slices).values(**rest, state=GroupState.REQUESTED))
                left -= stop - row.start
                same = leases and leases[-1].ordinal == row.ordinal
                leases.append(Lease(
                    lease_id=first + len(leases), epoch=row.epoch + 1, worker_id=worker_id, ordinal=row.ordinal,
                    start=row.start, stop=stop, prompt=leases[-1].prompt if same else decode(row.prompt, Prompt),
                    min_version=row.min_version, deadline=now + timeout_s,
                ))  # fmt: skip
            fields = {"state": GroupState.LEASED, "worker_id": worker_id, "deadline": now + timeout_s}
            _update_slices(connection, [_at(x) | fields | {"lease_id": x.lease_id, "epoch": x.epoch} for x in leases])
            counts = {"next_lease": first + len(leases), "expired_leases": meta.c.expired_leases + len(expired)}
            connection.execute(update(meta).values(counts))
        return leases

    def renew(self, leases: Sequence[Lease], timeout_s: float) -> list[Lease]:
        """Extend the deadlines; a lost lease raises FencedError, the others are extended."""
        at_least("timeout_s", timeout_s, 0.001, Real)
        with self._holding(leases) as (connection, held):
            deadline = self._clock() + timeout_s
            if held:
                connection.execute(_UPDATE_SLICE, [_at(row) | {"deadline": deadline} for row in held.values()])
        return [replace(x, deadline=deadline) for x in leases]

    def submit_many(self, work: Sequence[tuple[Lease, Sequence[Rollout]]]) -> None:
        """Store the rollouts of slices (GENERATED); lost leases raise FencedError after the rest is stored."""
        encoded = []
        for lease, rollouts in work:
            ordered = sorted(rollouts, key=lambda x: x.index)
            _check_covers(lease, "rollouts", [(x.ordinal, x.index) for x in ordered])
            for x in ordered:
                check_rollout(x)
            spanned = {span.version for x in ordered for span in x.version_spans}
            encoded.append((lease, encode(ordered, "rollouts"), spanned or {lease.min_version}))
        with self._holding([lease for lease, _ in work], GroupState.LEASED, "submitted") as (connection, held):
            named = sorted(set[int]().union(*(spanned for _, _, spanned in encoded)))
            live = set(connection.execute(_LIVE, {"spanned": named}).scalars())
            updates, records = [], []
            for lease, record, spanned in encoded:
                if lease.lease_id not in held:
                    continue
                bad = sorted(v for v in spanned if v not in live or v < lease.min_version)
                problem = f"{lease} was sampled under wrong weights"
                expected = f"surviving versions from {lease.min_version} on"
                fix = "publish a version before engines serve it; update them to lease.min_version before they sample"
                require(not bad, problem, key="versions", value=bad, expected=expected, fix=fix)
                fields = {"state": GroupState.GENERATED, "oldest_version": min(spanned), "newest_version": max(spanned)}
                updates.append(_at(lease) | fields)
                records.append((lease, record))
            self._payloads.write(connection, records)  # before the rows that refer to them
            _update_slices(connection, updates)

    def score_many(self, work: Sequence[tuple[Lease, Sequence[Verdict]]]) -> None:
        """Store the verdicts of slices in order of index (SCORED); lost leases raise as in `submit_many`."""
        problem, fix = "a verdict's score must be a finite number or None", "let the verifier answer score=None"
        for lease, verdicts in work:
            _check_covers(lease, "verdicts", [(lease.ordinal, lease.start + i) for i in range(len(verdicts))])
            for x in verdicts:
                require(x.score is None or math.isfinite(x.score), problem, key="score", value=x.score, fix=fix)
        fields = {"state": GroupState.SCORED}
        rows = {lease.lease_id: _at(lease) | fields | {"verdicts": encode(v, "verdicts")} for lease, v in work}
        with self._holding([lease for lease, _ in work], GroupState.GENERATED, "scored") as (connection, held):
            _update_slices(connection, [rows[lease_id] for lease_id in held], self._clock())

    def release(self, leases: Sequence[Lease]) -> None:
        """Give leases back: unfinished slices are REQUESTED again, lost leases passed over."""
        with self._db.write() as connection:
            _give_back(connection, [row for row in _held(connection, leases).values() if row.state in IN_WORK])

    def release_all(self, worker_id: str) -> int:
        """Give back what a worker that is dead still holds; returns the number of slices."""
        own = select(slices).where(slices.c.worker_id == worker_id, slices.c.state.in_(IN_WORK))
        with self._db.write() as connection:
            rows = connection.execute(own).all()
            _give_back(connection, rows)
        return len(rows)

    @contextmanager
    def _holding(
        self, leases: Sequence[Lease], state: GroupState | None = None, verb: str = ""
    ) -> Iterator[tuple[Connection, dict[int, Any]]]:
        """A write, and the slices (by lease_id) of those leases that are the newest of theirs.

        The others raise FencedError once it is committed; BufferError: named twice, or a held slice not in `state`.
        """
        ids = [x.lease_id for x in leases]
        require(len(set(ids)) == len(ids), "named twice", key="leases", value=ids, expected="distinct leases")
        with self._db.write() as connection:
            held = _held(connection, leases)
            lost = [x for x in leases if x.lease_id not in held]
            for x in leases if state else ():
                found = held[x.lease_id].state if x.lease_id in held else state
                require(found == state, f"{x} cannot be {verb} now", key="state", value=found, expected=str(state))
            yield connection, held
            if lost:
                connection.execute(update(meta).values(fenced_writes=meta.c.fenced_writes + len(lost)))
        if lost:
            raise FencedError(lost)


def _at(row: Any) -> dict[str, int]:
    """Parameters of _UPDATE_SLICE that address a row or lease."""
    return {"at_ordinal": row.ordinal, "at_start": row.start}


def _check_covers(lease: Lease, what: str, places: Sequence[tuple[int, int]]) -> None:
    """BufferError unless `places` (ordinal, index) are exactly the lease's samples in order."""
    expected = [(lease.ordinal, index) for index in range(lease.start, lease.stop)]
    problem, key = f"the {what} are not those of the lease", f"(ordinal, index) of {what}"
    require(places == expected, problem, key=key, value=places, expected=str(expected))


def _held(connection: Connection, leases: Sequence[Lease]) -> dict[int, Any]:
    """Slice rows, by lease_id, of those leases that are the newest of their slice."""
    # ids are never reused; epoch and place guard against a lease of another database
    place = attrgetter("lease_id", "epoch", "ordinal", "start", "stop")
    ours = {place(x) for x in leases}
    rows = connection.execute(_HELD, {"ids": [x.lease_id for x in leases]})
    return {row.lease_id: row for row in rows if place(row) in ours}


def _give_back(connection: Connection, rows: Sequence[Any]) -> None:
    """Slices return to REQUESTED; their rollouts, if any, are no longer referred to."""
    fields = {"state": GroupState.REQUESTED, **UNLEASED}
    _update_slices(connection, [_at(row) | fields for row in rows])


def _update_slices(connection: Connection, rows: Sequence[dict[str, Any]], scored_at: float | None = None) -> None:
    """Write slices (parameters of _UPDATE_SLICE), then the state of their groups, which follows from it."""
    if not rows:
        return
    connection.execute(_UPDATE_SLICE, rows)
    connection.execute(_FOLLOW, {"ordinals": sorted({x["at_ordinal"] for x in rows}), "now": scored_at})
