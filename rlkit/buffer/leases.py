"""Leases of slices, as functions on an open write transaction."""

from collections.abc import Iterable, Mapping, Sequence
from operator import attrgetter
from typing import Any

from sqlalchemy import Connection, bindparam, func, insert, select, update

from rlkit.buffer.checks import in_state, sampled_under
from rlkit.buffer.codec import decode
from rlkit.buffer.payloads import SegmentFiles
from rlkit.buffer.protocol import Lease
from rlkit.buffer.tables import IN_WORK, UNLEASED, groups, meta, slices, versions
from rlkit.types import GroupState, Prompt

_SLICE = (slices.c.ordinal == bindparam("at_ordinal")) & (slices.c.start == bindparam("at_start"))
UPDATE_SLICE = update(slices).where(_SLICE)
"""executemany with at_ordinal and at_start."""

# statements of the busy verbs, built once: building one costs more than running it
_UPDATE_GROUP = update(groups).where(groups.c.ordinal == bindparam("at_ordinal"))
_HELD = select(slices).where(slices.c.lease_id.in_(bindparam("ids", expanding=True)))
_LIVE = select(versions.c.version).where(versions.c.live, versions.c.version.in_(bindparam("spanned", expanding=True)))
_SLICE_STATES = (
    select(slices.c.ordinal, slices.c.state, func.min(slices.c.oldest_version))
    .where(slices.c.ordinal.in_(bindparam("ordinals", expanding=True)))
    .group_by(slices.c.ordinal, slices.c.state)
)


def at(row: Any) -> dict[str, int]:
    """Parameters of UPDATE_SLICE that address a row or lease."""
    return {"at_ordinal": row.ordinal, "at_start": row.start}


def anything_to_lease(connection: Connection, now: float) -> bool:
    """Whether a slice waits, or would once expired leases are reclaimed."""
    expired = slices.c.state.in_(IN_WORK) & (slices.c.deadline <= now)
    query = select(slices.c.ordinal).where((slices.c.state == GroupState.REQUESTED) | expired)
    return connection.execute(query.limit(1)).first() is not None


def reclaim_expired(connection: Connection, now: float) -> None:
    """Take back every lease past its deadline, counted."""
    query = select(slices.c.ordinal, slices.c.start).where(slices.c.state.in_(IN_WORK), slices.c.deadline <= now)
    expired = connection.execute(query).all()
    if expired:
        give_back(connection, expired)
        connection.execute(update(meta).values(expired_leases=meta.c.expired_leases + len(expired)))


def give_back(connection: Connection, rows: Sequence[Any]) -> None:
    """Slices return to REQUESTED; their rollouts, if any, are no longer referred to."""
    fields = {"state": GroupState.REQUESTED, **UNLEASED}
    connection.execute(UPDATE_SLICE, [at(row) | fields for row in rows])
    refresh_groups(connection, {row.ordinal for row in rows})


def lease_slices(connection: Connection, worker_id: str, max_samples: int, deadline: float) -> list[Lease]:
    """Lease the lowest waiting slices, `max_samples` samples at most."""
    rows = connection.execute(
        select(slices, groups.c.prompt, groups.c.min_version)
        .join(groups)
        .where(slices.c.state == GroupState.REQUESTED)
        .order_by(slices.c.ordinal, slices.c.start)
        .limit(max_samples)
    ).all()
    next_id = connection.execute(select(meta.c.next_lease)).scalar_one()
    prompts: dict[int, Prompt] = {}
    leases: list[Lease] = []
    left = max_samples
    for row in rows:
        stop = row.stop
        if stop - row.start > left:
            if leases:
                break
            stop = row.start + left
            rest = {"ordinal": row.ordinal, "start": stop, "stop": row.stop, "epoch": row.epoch}
            connection.execute(UPDATE_SLICE, [at(row) | {"stop": stop}])
            connection.execute(insert(slices).values(**rest, state=GroupState.REQUESTED))
        left -= stop - row.start
        if row.ordinal not in prompts:
            prompts[row.ordinal] = decode(row.prompt, Prompt)
        place = {"ordinal": row.ordinal, "start": row.start, "stop": stop, "min_version": row.min_version}
        ids = {"lease_id": next_id + len(leases), "epoch": row.epoch + 1, "worker_id": worker_id}
        leases.append(Lease(**place, **ids, prompt=prompts[row.ordinal], deadline=deadline))
        if left == 0:
            break
    if leases:
        fields = {"state": GroupState.LEASED, "worker_id": worker_id, "deadline": deadline}
        connection.execute(UPDATE_SLICE, [at(x) | fields | {"lease_id": x.lease_id, "epoch": x.epoch} for x in leases])
        connection.execute(update(meta).values(next_lease=next_id + len(leases)))
        refresh_groups(connection, {x.ordinal for x in leases})
    return leases


def held(connection: Connection, leases: Sequence[Lease]) -> tuple[dict[int, Any], list[Lease]]:
    """(slice rows by lease_id of leases that are the newest of their slice, the lost leases)."""
    # ids are never reused; epoch and place guard against a lease of another database
    place = attrgetter("lease_id", "epoch", "ordinal", "start", "stop")
    found = {place(row): row for row in connection.execute(_HELD, {"ids": [x.lease_id for x in leases]})}
    rows = {x.lease_id: found[place(x)] for x in leases if place(x) in found}
    return rows, [x for x in leases if place(x) not in found]


def renew(connection: Connection, leases: Sequence[Lease], deadline: float) -> list[Lease]:
    """Extend held leases; returns the lost ones."""
    rows, lost = held(connection, leases)
    if rows:
        connection.execute(UPDATE_SLICE, [at(row) | {"deadline": deadline} for row in rows.values()])
    return lost


def submit(
    connection: Connection, work: Sequence[tuple[Lease, bytes, set[int]]], payloads: SegmentFiles
) -> list[Lease]:
    """Store (lease, encoded rollouts, their versions); returns the lost leases.

    A record is written under the write lock, before the row that refers to it: see keep_only.
    """
    rows, lost = held(connection, [lease for lease, _, _ in work])
    held_work = [x for x in work if x[0].lease_id in rows]
    named = set[int]().union(*(spanned for _, _, spanned in held_work))
    live = set(connection.execute(_LIVE, {"spanned": sorted(named)}).scalars())
    for lease, _, spanned in held_work:
        in_state(rows[lease.lease_id], GroupState.LEASED, "submitted")
        sampled_under(lease, spanned, live)
    updates = []
    for lease, record, spanned in held_work:
        fields = {"state": GroupState.GENERATED, "oldest_version": min(spanned), "newest_version": max(spanned)}
        updates.append(at(lease) | fields | payloads.append(record)._asdict())
    if updates:
        connection.execute(UPDATE_SLICE, updates)
        refresh_groups(connection, {row.ordinal for row in rows.values()})
    return lost


def score(connection: Connection, work: Sequence[tuple[Lease, bytes]], now: float) -> list[Lease]:
    """Store (lease, encoded verdicts); returns the lost leases."""
    rows, lost = held(connection, [lease for lease, _ in work])
    for row in rows.values():
        in_state(row, GroupState.GENERATED, "scored")
    fields = {"state": GroupState.SCORED}
    updates = [at(lease) | fields | {"verdicts": verdicts} for lease, verdicts in work if lease.lease_id in rows]
    if updates:
        connection.execute(UPDATE_SLICE, updates)
        refresh_groups(connection, {row.ordinal for row in rows.values()}, now)
    return lost


def release(connection: Connection, leases: Sequence[Lease]) -> None:
    """Give back what is held and unfinished."""
    rows, _ = held(connection, leases)
    unfinished = [row for row in rows.values() if row.state in IN_WORK]
    if unfinished:
        give_back(connection, unfinished)


def refresh_groups(connection: Connection, ordinals: Iterable[int], scored_at: float | None = None) -> None:
    """Set the state of open groups from that of their slices."""
    wanted = sorted(set(ordinals))
    states: dict[int, dict[str, Any]] = {}
    for ordinal, state, oldest in connection.execute(_SLICE_STATES, {"ordinals": wanted}):
        states.setdefault(ordinal, {})[state] = oldest
    updates = []
    for ordinal, found in states.items():
        state = next(x for x in _PRECEDENCE if x in found)
        oldest, when = (found[state], scored_at) if state == GroupState.SCORED else (None, None)
        updates.append({"at_ordinal": ordinal, "state": state, "oldest_version": oldest, "scored_at": when})
    connection.execute(_UPDATE_GROUP, updates)


def insert_slices(connection: Connection, samples: Mapping[int, int], slice_samples: int) -> None:
    """Cut groups of `samples` (by ordinal) into slices that wait for a worker."""
    rows = [
        {"ordinal": ordinal, "start": start, "stop": min(start + slice_samples, total), "state": GroupState.REQUESTED}
        for ordinal, total in samples.items()
        for start in range(0, total, slice_samples)
    ]
    connection.execute(insert(slices), rows)


_PRECEDENCE = (GroupState.LEASED, GroupState.REQUESTED, GroupState.GENERATED, GroupState.SCORED)
"""A group is leased while any slice is, requested while any waits, scored once all are."""
