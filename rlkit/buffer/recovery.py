"""Checkpoints: what one covers (ordinals below its `next_ordinal`), and how a run goes on from it: docs/buffer.md."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from itertools import groupby
from operator import attrgetter
from typing import Any

from sqlalchemy import Connection, delete, func, insert, select, update

from rlkit.buffer.database import Database
from rlkit.buffer.payloads import RecordFiles, RecordRows
from rlkit.buffer.protocol import RollbackReport, Watermark, require
from rlkit.buffer.tables import UNENDED, UNLEASED, bound, evaluations, groups, meta, of, position, slices, versions
from rlkit.errors import BufferError
from rlkit.types import GroupState


class Checkpoints:
    """Verbs of the learner's checkpoints."""

    _db: Database
    _payloads: RecordFiles | RecordRows
    _clock: Callable[[], float]
    _learner: int | None = None  # which learner this process is, once it has rolled back

    @contextmanager
    def leading(self) -> Iterator[Connection]:
        """A write of the learner. BufferError once another one has gone on with the run: this one may have slept."""
        with self._db.write() as connection:
            fix = "end one of the two: only the later one's work counts"
            ours = self._learner in (None, position(connection).learner)
            require(ours, "another learner has gone on with this run", key="buffer", value=self._db.name, fix=fix)
            yield connection

    def watermark(self) -> Watermark:
        """State to write into a checkpoint."""
        with self._db.view() as connection:
            return _watermark(connection)

    def commit(self, watermark: Watermark) -> None:
        """The checkpoint is on disk: prompts and rollouts of groups it covers may be removed."""
        with self.leading() as connection:
            known, newest = _check(connection, watermark), _watermark(connection)
            ours = known is not None and known.live and watermark.next_ordinal <= newest.next_ordinal
            expected = f"at most step {newest.step}, next_ordinal {newest.next_ordinal}: the checkpoint's watermark()"
            _demand(ours, watermark, "this checkpoint is not of the surviving lineage", expected)
            connection.execute(update(meta).values(committed_step=watermark.step))
            covered = slices.c.ordinal < watermark.next_ordinal
            connection.execute(of(groups, select(slices.c.ordinal).where(covered)).values(prompt=None))
            connection.execute(delete(slices).where(covered))
            self._payloads.delete_below(connection, watermark.next_ordinal)
        self._db.reuse()

    def forget(self) -> None:
        """Another run begins here, without a checkpoint: no group, evaluation or snapshot is of its recipe."""
        with self._db.write() as connection:
            self._payloads.delete_below(connection, position(connection).next_ordinal)
            for table in (slices, groups, evaluations):
                connection.execute(delete(table))
            connection.execute(update(versions).values(path=None, checksum=None, size=None, probe=None))
            connection.execute(update(meta).values(step=0, next_ordinal=0, committed_step=None, ended=False))

    def rollback(self, watermark: Watermark) -> RollbackReport:
        """Resume from a checkpoint: undo what was trained, taken or dropped after it.

        Every lease is void. Each group that is kept fulfils the invariant behind the staleness bound. Also right for a
        database that is empty or behind the checkpoint; without a checkpoint, all numbers of the watermark are 0.
        """
        with self._db.write() as connection:
            now = self._clock()
            dead = _move_versions(connection, watermark, now)
            place, frontier = position(connection), watermark.next_ordinal
            live = select(versions.c.version, versions.c.step).where(versions.c.live)
            steps = {version: step for version, step in connection.execute(live)}

            # what a database behind the checkpoint still holds of groups the checkpoint covers
            connection.execute(delete(groups).where(groups.c.ordinal < frontier, groups.c.state.in_(UNENDED)))
            later = select(groups.c.ordinal, groups.c.prompt).where(groups.c.ordinal >= frontier)
            rows = connection.execute(later.order_by(groups.c.ordinal)).all()
            # without gaps from the watermark up to the bound; the learner requests the rest again
            end, most = frontier, bound(place, watermark.step, watermark.refused)
            for row in rows:
                if row.prompt is None or row.ordinal != end or end >= most:
                    break
                end += 1
            connection.execute(delete(groups).where(groups.c.ordinal >= end))

            restored: list[int] = []
            corrupt: list[int] = []
            kept = select(slices).where(slices.c.ordinal >= frontier).order_by(slices.c.ordinal)
            for ordinal, parts in groupby(connection.execute(kept).all(), attrgetter("ordinal")):
                group = list(parts)
                if all(
                    x.state == GroupState.SCORED
                    and x.newest_version in steps  # then so are its older ones: the newest dies first
                    and ordinal < bound(place, steps[x.oldest_version], watermark.refused)
                    for x in group
                ):
                    try:
                        self._payloads.read(connection, group)
                        restored.append(ordinal)
                    except BufferError:  # reported, and sampled again
                        corrupt.append(ordinal)
            again = tuple(sorted(set(range(frontier, end)) - set(restored)))
            undone: dict[str, Any] = {"trained_step": None, "drop_reason": None, "outcomes": None}
            connection.execute(of(groups, restored).values(state=GroupState.SCORED, **undone))
            undone |= {"min_version": watermark.version, "requested_at": now, "oldest_version": None, "scored_at": None}
            connection.execute(of(groups, again).values(state=GroupState.REQUESTED, **undone))
            connection.execute(of(slices, again).values(state=GroupState.REQUESTED, **UNLEASED))
            connection.execute(delete(evaluations).where(evaluations.c.step > watermark.step))
            moved = asdict(watermark) | {"next_ordinal": end, "ended": False, "learner": place.learner + 1}
            moved["next_version"] = max(place.next_version, watermark.version + 1)
            connection.execute(update(meta).values(moved))
        self._learner = place.learner + 1
        removed = tuple(row.ordinal for row in rows if row.ordinal >= end)
        return RollbackReport(
            restored=tuple(restored), requested_again=again, dead_versions=dead, corrupt=tuple(corrupt), removed=removed
        )


def _watermark(connection: Connection) -> Watermark:
    """Watermark of the surviving lineage as it stands."""
    now = position(connection)
    lowest = connection.execute(select(func.min(groups.c.ordinal)).where(groups.c.state.in_(UNENDED))).scalar_one()
    frontier = now.next_ordinal if lowest is None else lowest
    refused = frontier - now.step * now.prompts_per_step
    return Watermark(step=now.step, version=now.version, next_ordinal=frontier, refused=refused)


def _move_versions(connection: Connection, watermark: Watermark, now: float) -> tuple[int, ...]:
    """Make `watermark.version` the newest live version; returns the versions that die."""
    known, place = _check(connection, watermark), position(connection)
    ahead = watermark.version >= place.next_version and watermark.step > place.step
    if known is None and ahead:  # a buffer behind the checkpoint, or empty
        connection.execute(insert(versions).values(version=watermark.version, step=watermark.step, published_at=now))
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
    dying = connection.execute(select(versions.c.version).where(newer).order_by(versions.c.version)).scalars().all()
    connection.execute(update(versions).where(newer).values(live=False))
    return tuple(dying)


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
