"""Commit and rollback: what a checkpoint covers (ordinals below its `next_ordinal`), and how a run goes on from one.

Rollback re-establishes the invariant behind the staleness bound (docs/buffer.md) for every group it keeps:

    ordinal - (drops below it) < (step of its oldest version + S + 1) * P
"""

from typing import Any

from sqlalchemy import Connection, delete, func, insert, select, update

from rlkit.buffer.payloads import PayloadRef, SegmentFiles
from rlkit.buffer.protocol import RollbackReport, Watermark, require
from rlkit.buffer.tables import UNENDED, UNLEASED, bound, groups, meta, position, slices, update_each, versions
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
    known, newest = _check(connection, watermark), current_watermark(connection)
    ours = known is not None and known.live and watermark.next_ordinal <= newest.next_ordinal
    expected = f"at most step {newest.step}, next_ordinal {newest.next_ordinal}: the checkpoint's watermark()"
    _demand(ours, watermark, "this checkpoint is not of the surviving lineage", expected)
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
    dead = _move_versions(connection, watermark, _check(connection, watermark), now)
    place = position(connection)
    live = select(versions.c.version, versions.c.step).where(versions.c.live)
    steps = {version: step for version, step in connection.execute(live)}

    # what a database behind the checkpoint still holds of groups the checkpoint covers
    below = groups.c.ordinal < watermark.next_ordinal
    connection.execute(delete(groups).where(below, groups.c.state.in_(UNENDED)))
    later = select(groups.c.ordinal, groups.c.prompt.is_(None).label("forgotten"))
    later = later.where(groups.c.ordinal >= watermark.next_ordinal).order_by(groups.c.ordinal)
    rows = connection.execute(later).all()
    # without gaps from the watermark up to the bound; the learner requests the rest again
    end = watermark.next_ordinal
    for row in rows:
        if row.forgotten or row.ordinal != end or end >= bound(place, watermark.step, watermark.refused):
            break
        end += 1
    removed = tuple(row.ordinal for row in rows if row.ordinal >= end)
    connection.execute(delete(groups).where(groups.c.ordinal >= end))

    by_ordinal: dict[int, list[Any]] = {ordinal: [] for ordinal in range(watermark.next_ordinal, end)}
    for row in connection.execute(select(slices).where(slices.c.ordinal >= watermark.next_ordinal)):
        by_ordinal[row.ordinal].append(row)
    restored: list[int] = []
    again: list[int] = []
    corrupt: list[int] = []
    for ordinal, parts in by_ordinal.items():
        survives = all(
            x.state == GroupState.SCORED
            and x.newest_version in steps  # then so are its older ones: the newest dies first
            and ordinal < bound(place, steps[x.oldest_version], watermark.refused)
            for x in parts
        )
        readable = survives and all(_readable(payloads, x) for x in parts)
        (restored if readable else again).append(ordinal)
        corrupt += [ordinal] if survives and not readable else []
    undone: dict[str, Any] = {"trained_step": None, "drop_reason": None, "outcomes": None}
    update_each(connection, groups, restored, state=GroupState.SCORED, **undone)
    undone |= {"min_version": watermark.version, "requested_at": now, "oldest_version": None, "scored_at": None}
    update_each(connection, groups, again, state=GroupState.REQUESTED, **undone)
    update_each(connection, slices, again, state=GroupState.REQUESTED, **UNLEASED)
    moved = {"step": watermark.step, "version": watermark.version, "refused": watermark.refused, "next_ordinal": end}
    moved["next_version"] = max(place.next_version, watermark.version + 1)
    connection.execute(update(meta).values(moved))
    return RollbackReport(
        restored=tuple(restored), requested_again=tuple(again), dead_versions=tuple(dead),
        corrupt=tuple(corrupt), removed=removed,
    )  # fmt: skip


def _move_versions(connection: Connection, watermark: Watermark, known: Any, now: float) -> list[int]:
    """Make `watermark.version` (its row: `known`) the newest live version; returns the versions that die."""
    newest = connection.execute(select(func.max(versions.c.version))).scalar_one()
    place = position(connection)
    if known is None and watermark.version > newest and watermark.step > place.step:  # a buffer behind it, or empty
        made = {"version": watermark.version, "step": watermark.step, "published_at": now}
        connection.execute(insert(versions).values(made))
    else:
        expected = f"a live version of the buffer (newest: {place.version}); or move the buffer aside to start it empty"
        live = known is not None and known.live
        _demand(live, watermark, "this checkpoint's version is not in the buffer's surviving lineage", expected)
    later = (groups.c.state == GroupState.TRAINED) & (groups.c.trained_step >= watermark.step)
    query = select(groups.c.ordinal).where(later, groups.c.ordinal < watermark.next_ordinal)
    ordinal = connection.execute(query.limit(1)).scalar()  # what a checkpoint covers is not trained on after it
    problem = "this checkpoint is of an abandoned lineage, written before an earlier rollback"
    _demand(ordinal is None, watermark, problem, f"group {ordinal} not trained on after it")
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


def _check(connection: Connection, watermark: Watermark) -> Any:
    """The row of the watermark's version, None if unknown; BufferError unless the watermark's numbers agree."""
    prompts_per_step = position(connection).prompts_per_step
    expected = watermark.step * prompts_per_step + watermark.refused
    sound = min(watermark.step, watermark.version, watermark.refused) >= 0 and watermark.next_ordinal == expected
    rule = f"next_ordinal = step * {prompts_per_step} + refused = {expected}"
    _demand(sound, watermark, "this watermark cannot be of a run with these prompts_per_step", rule)
    known = connection.execute(select(versions).where(versions.c.version == watermark.version)).first()
    step = watermark.step if known is None else known.step
    rule = f"step {step}, that of version {watermark.version}"
    _demand(step == watermark.step, watermark, "this watermark is of another run", rule)
    return known


def _demand(holds: bool, watermark: Watermark, problem: str, expected: str) -> None:
    fix = "resume from the checkpoint of this run that it last went on from, or a newer one"
    require(holds, problem, key="watermark", value=watermark, expected=expected, fix=fix)
