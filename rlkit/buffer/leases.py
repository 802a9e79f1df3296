"""Leases of slices, as functions on an open write transaction."""

from collections.abc import Sequence
from operator import attrgetter
from typing import Any

from sqlalchemy import Connection, bindparam, func, insert, select, update

from rlkit.buffer.codec import decode
from rlkit.buffer.payloads import SegmentFiles
from rlkit.buffer.protocol import Lease, require
from rlkit.buffer.tables import IN_WORK, UNLEASED, groups, meta, slices, versions
from rlkit.types import GroupState, Prompt

_PRECEDENCE = (GroupState.LEASED, GroupState.REQUESTED, GroupState.GENERATED, GroupState.SCORED)
"""A group is leased while any slice is, requested while any waits, scored once all are."""

# statements of the busy verbs, built once: building one costs more than running it
_SLICE = (slices.c.ordinal == bindparam("at_ordinal")) & (slices.c.start == bindparam("at_start"))
_UPDATE_SLICE = update(slices).where(_SLICE)
_UPDATE_GROUP = update(groups).where(groups.c.ordinal == bindparam("at_ordinal"))
_HELD = select(slices).where(slices.c.lease_id.in_(bindparam("ids", expanding=True)))
_LIVE = select(versions.c.version).where(versions.c.live, versions.c.version.in_(bindparam("spanned", expanding=True)))
_SLICE_STATES = (
    select(slices.c.ordinal, slices.c.state, func.min(slices.c.oldest_version))
    .where(slices.c.ordinal.in_(bindparam("ordinals", expanding=True)))
    .group_by(slices.c.ordinal, slices.c.state)
)


def at(row: Any) -> dict[str, int]:
    """Parameters of _UPDATE_SLICE that address a row or lease."""
    return {"at_ordinal": row.ordinal, "at_start": row.start}


def check_covers(lease: Lease, what: str, places: Sequence[tuple[int, int]]) -> None:
    """BufferError unless `places` (ordinal, index) are exactly the lease's samples in order."""
    expected = [(lease.ordinal, index) for index in range(lease.start, lease.stop)]
    problem, key = f"the {what} are not those of the lease", f"(ordinal, index) of {what}"
    require(places == expected, problem, key=key, value=places, expected=str(expected))


def _expired(now: float) -> Any:
    return slices.c.state.in_(IN_WORK) & (slices.c.deadline <= now)


def anything_to_lease(connection: Connection, now: float) -> bool:
    """Whether a slice waits, or would once expired leases are reclaimed."""
    query = select(slices.c.ordinal).where((slices.c.state == GroupState.REQUESTED) | _expired(now))
    return connection.execute(query.limit(1)).first() is not None


def reclaim_expired(connection: Connection, now: float) -> None:
    """Take back every lease past its deadline, counted."""
    rows = connection.execute(select(slices.c.ordinal, slices.c.start).where(_expired(now))).all()
    give_back(connection, rows)
    if rows:
        connection.execute(update(meta).values(expired_leases=meta.c.expired_leases + len(rows)))


def give_back(connection: Connection, rows: Sequence[Any]) -> None:
    """Slices return to REQUESTED; their rollouts, if any, are no longer referred to."""
    fields = {"state": GroupState.REQUESTED, **UNLEASED}
    _update_slices(connection, [at(row) | fields for row in rows])


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
            connection.execute(_UPDATE_SLICE, [at(row) | {"stop": stop}])
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
        connection.execute(update(meta).values(next_lease=next_id + len(leases)))
        _update_slices(connection, [at(x) | fields | {"lease_id": x.lease_id, "epoch": x.epoch} for x in leases])
    return leases


def held(connection: Connection, leases: Sequence[Lease]) -> tuple[dict[int, Any], list[Lease]]:
    """(slice rows by lease_id of leases that are the newest of their slice, the lost leases)."""
    # ids are never reused; epoch and place guard against a lease of another database
    place = attrgetter("lease_id", "epoch", "ordinal", "start", "stop")
    found = {place(row): row for row in connection.execute(_HELD, {"ids": [x.lease_id for x in leases]})}
    rows = {x.lease_id: found[place(x)] for x in leases if place(x) in found}
    return rows, [x for x in leases if place(x) not in found]


def check_state(leases: Sequence[Lease], rows: dict[int, Any], state: GroupState, verb: str) -> None:
    """BufferError for a lease named twice, or a held slice that is not in `state`."""
    ids = [x.lease_id for x in leases]
    require(len(set(ids)) == len(ids), "named twice", key="leases", value=ids, expected="distinct leases")
    for x in leases:
        found = rows[x.lease_id].state if x.lease_id in rows else state
        require(found == state, f"{x} cannot be {verb} now", key="state", value=str(found), expected=str(state))


def renew(connection: Connection, leases: Sequence[Lease], deadline: float) -> list[Lease]:
    """Extend held leases; returns the lost ones."""
    rows, lost = held(connection, leases)
    if rows:
        connection.execute(_UPDATE_SLICE, [at(row) | {"deadline": deadline} for row in rows.values()])
    return lost


def submit(
    connection: Connection, work: Sequence[tuple[Lease, bytes, set[int]]], payloads: SegmentFiles
) -> list[Lease]:
    """Store (lease, encoded rollouts, their versions); returns the lost leases.

    A record is written under the write lock, before the row that refers to it: see keep_only.
    """
    leases = [lease for lease, _, _ in work]
    rows, lost = held(connection, leases)
    check_state(leases, rows, GroupState.LEASED, "submitted")
    kept = [x for x in work if x[0].lease_id in rows]
    named = sorted(set[int]().union(*(spanned for _, _, spanned in kept)))
    live = set(connection.execute(_LIVE, {"spanned": named}).scalars())
    for lease, _, spanned in kept:
        bad = sorted(v for v in spanned if v not in live or v < lease.min_version)
        problem, expected = (
            f"{lease} was sampled under wrong weights",
            f"surviving versions from {lease.min_version} on",
        )
        fix = "publish a version before engines serve it; update the engine to lease.min_version before it samples"
        require(not bad, problem, key="versions", value=bad, expected=expected, fix=fix)
    updates = []
    for lease, record, spanned in kept:
        fields = {"state": GroupState.GENERATED, "oldest_version": min(spanned), "newest_version": max(spanned)}
        updates.append(at(lease) | fields | payloads.append(record)._asdict())
    _update_slices(connection, updates)
    return lost


def score(connection: Connection, work: Sequence[tuple[Lease, bytes]], now: float) -> list[Lease]:
    """Store (lease, encoded verdicts); returns the lost leases."""
    leases = [lease for lease, _ in work]
    rows, lost = held(connection, leases)
    check_state(leases, rows, GroupState.GENERATED, "scored")
    fields = {"state": GroupState.SCORED}
    _update_slices(connection, [at(x) | fields | {"verdicts": v} for x, v in work if x.lease_id in rows], now)
    return lost


def release(connection: Connection, leases: Sequence[Lease]) -> None:
    """Give back what is held and unfinished."""
    rows, _ = held(connection, leases)
    give_back(connection, [row for row in rows.values() if row.state in IN_WORK])


def void(connection: Connection, ordinals: Sequence[int]) -> None:
    """End the unfinished slices of groups that are dropped; scored ones stay: a rollback may bring the group back."""
    unfinished = slices.c.ordinal.in_(ordinals) & (slices.c.state != GroupState.SCORED)
    connection.execute(update(slices).where(unfinished).values(state=GroupState.DROPPED, **UNLEASED))


def _update_slices(connection: Connection, rows: Sequence[dict[str, Any]], scored_at: float | None = None) -> None:
    """Write slices (parameters of _UPDATE_SLICE), then the state of their groups, which follows from it."""
    if not rows:
        return
    connection.execute(_UPDATE_SLICE, rows)
    wanted = sorted({row["at_ordinal"] for row in rows})
    states: dict[int, dict[str, Any]] = {}
    for ordinal, state, oldest in connection.execute(_SLICE_STATES, {"ordinals": wanted}):
        states.setdefault(ordinal, {})[state] = oldest
    updates = []
    for ordinal, found in states.items():
        state = next(x for x in _PRECEDENCE if x in found)
        oldest, when = (found[state], scored_at) if state == GroupState.SCORED else (None, None)
        updates.append({"at_ordinal": ordinal, "state": state, "oldest_version": oldest, "scored_at": when})
    connection.execute(_UPDATE_GROUP, updates)
