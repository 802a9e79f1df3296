"""Commit and rollback: what a checkpoint covers (ordinals below its `next_ordinal`), and how a run goes on from one.

Rollback re-establishes the invariant behind the staleness bound (docs/buffer.md) for every group it keeps:

    ordinal - (drops below it) < (step of its oldest version + S + 1) * P
"""

from typing import Any

from sqlalchemy import Connection, delete, func, insert, select, update

from rlkit.buffer.payloads import PayloadRef, SegmentFiles
from rlkit.buffer.protocol import RollbackReport, Watermark
from rlkit.buffer.tables import UNENDED, UNLEASED, groups, meta, position, slices, update_each, versions
from rlkit.errors import BufferError
from rlkit.types import GroupState


def current_watermark(connection: Connection) -> Watermark:
    """Watermark of the surviving lineage as it stands."""
    now = position(connection)
    lowest = connection.execute(select(func.min(groups.c.ordinal)).where(groups.c.state.in_(UNENDED))).scalar_one()
    frontier = now.next_ordinal if lowest is None else lowest
    refused = frontier - now.step * now.prompts_per_step
    return Watermark(step=now.step, version=now.version, next_ordinal=frontier, refused=refused)


def commit(connection: Connection, watermark: Watermark, payloads: SegmentFiles, keep_payloads: bool) -> None:
    """Forget prompts and rollouts of covered groups and delete segments nothing else refers to."""
    _check(connection, watermark)
    live = _version(connection, watermark.version)
    newest = current_watermark(connection)
    if live is None or not live.live or watermark.next_ordinal > newest.next_ordinal:
        expected = f"at most step {newest.step}, next_ordinal {newest.next_ordinal}: the checkpoint's watermark()"
        raise _refused("this checkpoint is not of the surviving lineage", watermark, expected)
    connection.execute(update(meta).values(committed_step=watermark.step))
    if keep_payloads:
        return
    covered = groups.c.ordinal < watermark.next_ordinal
    connection.execute(delete(slices).where(slices.c.ordinal < watermark.next_ordinal))
    connection.execute(update(groups).where(covered, groups.c.prompt.is_not(None)).values(prompt=None))
    # under the write lock: no other process is between writing a record and referring to it
    query = select(slices.c.segment).where(slices.c.segment.is_not(None)).distinct()
    payloads.keep_only(set(connection.execute(query).scalars()))


def rollback(connection: Connection, watermark: Watermark, payloads: SegmentFiles, now: float) -> RollbackReport:
    """See SqlBuffer.rollback."""
    _check(connection, watermark)
    _check_ledger(connection, watermark)
    dead = _move_versions(connection, watermark, now)
    place = position(connection)
    live = select(versions.c.version, versions.c.step).where(versions.c.live)
    steps = {version: step for version, step in connection.execute(live)}

    def bound(step: int) -> int:
        return int((step + place.max_staleness + 1) * place.prompts_per_step + watermark.refused)

    # what a database behind the checkpoint still holds of groups the checkpoint covers
    below = groups.c.ordinal < watermark.next_ordinal
    connection.execute(delete(groups).where(below, groups.c.state.in_(UNENDED)))
    later = select(groups.c.ordinal, groups.c.prompt.is_(None).label("forgotten"))
    later = later.where(groups.c.ordinal >= watermark.next_ordinal).order_by(groups.c.ordinal)
    rows = connection.execute(later).all()
    # without gaps from the watermark up to the bound; the learner requests the rest again
    end = watermark.next_ordinal
    for row in rows:
        if row.forgotten or row.ordinal != end or end >= bound(watermark.step):
            break
        end += 1
    removed = tuple(row.ordinal for row in rows if row.ordinal >= end)
    connection.execute(delete(groups).where(groups.c.ordinal >= end))

    by_ordinal: dict[int, list[Any]] = {ordinal: [] for ordinal in range(watermark.next_ordinal, end)}
    for row in connection.execute(select(slices).where(slices.c.ordinal >= watermark.next_ordinal)):
        by_ordinal[row.ordinal].append(row)
    restored, again, corrupt = [], [], []
    for ordinal, parts in by_ordinal.items():
        survives = all(
            x.state == GroupState.SCORED
            and x.newest_version in steps  # then so are its older ones: the newest dies first
            and ordinal < bound(steps[x.oldest_version])
            for x in parts
        )
        if survives and all(_readable(payloads, x) for x in parts):
            restored.append(ordinal)
            continue
        again.append(ordinal)
        if survives:
            corrupt.append(ordinal)
    _restore(connection, restored, again, watermark, now)
    moved = {"step": watermark.step, "version": watermark.version, "refused": watermark.refused, "next_ordinal": end}
    moved["next_version"] = max(place.next_version, watermark.version + 1)
    connection.execute(update(meta).values(moved))
    return RollbackReport(
        restored=tuple(restored), requested_again=tuple(again), dead_versions=tuple(dead),
        corrupt=tuple(corrupt), removed=removed,
    )  # fmt: skip


def _restore(connection: Connection, restored: list[int], again: list[int], watermark: Watermark, now: float) -> None:
    undone: dict[str, Any] = {"trained_step": None, "drop_reason": None}
    update_each(connection, groups, restored, state=GroupState.SCORED, **undone)
    fresh = undone | {"min_version": watermark.version, "requested_at": now, "oldest_version": None, "scored_at": None}
    update_each(connection, groups, again, state=GroupState.REQUESTED, **fresh)
    update_each(connection, slices, again, state=GroupState.REQUESTED, **UNLEASED)


def _move_versions(connection: Connection, watermark: Watermark, now: float) -> list[int]:
    """Make `watermark.version` the newest live version; returns the versions that die."""
    known = _version(connection, watermark.version)
    newest = connection.execute(select(func.max(versions.c.version))).scalar_one()
    place = position(connection)
    if known is None and watermark.version > newest and watermark.step > place.step:  # a buffer behind it, or empty
        made = {"version": watermark.version, "step": watermark.step, "published_at": now}
        connection.execute(insert(versions).values(made))
    elif known is None or not known.live:
        expected = f"a live version of the buffer (newest: {place.version}); or move the buffer aside to start it empty"
        raise _refused("this checkpoint's version is not in the buffer's surviving lineage", watermark, expected)
    newer = versions.c.live & (versions.c.version > watermark.version)
    dying = list(connection.execute(select(versions.c.version).where(newer).order_by(versions.c.version)).scalars())
    connection.execute(update(versions).where(newer).values(live=False))
    return dying


def _readable(payloads: SegmentFiles, row: Any) -> bool:
    try:
        payloads.read(PayloadRef(row.segment, row.offset, row.length))
    except BufferError:
        return False  # reported as corrupt by the caller
    return True


def _version(connection: Connection, version: int) -> Any:
    return connection.execute(select(versions).where(versions.c.version == version)).first()


def _check(connection: Connection, watermark: Watermark) -> None:
    prompts_per_step = position(connection).prompts_per_step
    expected = watermark.step * prompts_per_step + watermark.refused
    known = _version(connection, watermark.version)
    sound = min(watermark.step, watermark.version, watermark.refused) >= 0
    if not sound or watermark.next_ordinal != expected:
        rule = f"next_ordinal = step * {prompts_per_step} + refused = {expected}"
        raise _refused("this watermark cannot be of a run with these prompts_per_step", watermark, rule)
    if known is not None and known.step != watermark.step:
        rule = f"step {known.step}, that of version {watermark.version}"
        raise _refused("this watermark is of another run", watermark, rule)


def _check_ledger(connection: Connection, watermark: Watermark) -> None:
    """What the checkpoint covers cannot have been trained on after it."""
    later = (groups.c.state == GroupState.TRAINED) & (groups.c.trained_step >= watermark.step)
    query = select(groups.c.ordinal).where(later, groups.c.ordinal < watermark.next_ordinal)
    ordinal = connection.execute(query.limit(1)).scalar()
    if ordinal is not None:
        problem = "this checkpoint is of an abandoned lineage, written before an earlier rollback"
        raise _refused(problem, watermark, f"group {ordinal} not trained on after it")


def _refused(problem: str, watermark: Watermark, expected: str) -> BufferError:
    fix = "resume from the checkpoint of this run that it last went on from, or a newer one"
    return BufferError(problem, key="watermark", value=watermark, expected=expected, fix=fix)
