"""The versioned buffer on a SQL database: the learner's verbs, whose admission and order are the staleness bound.

Every verb is one transaction; misuse raises BufferError. The workers' verbs are in leases.py; contract: docs/buffer.md.
"""

import time
from collections.abc import Callable, Collection, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, func, insert, select, update

from rlkit.buffer import tables
from rlkit.buffer.database import Database
from rlkit.buffer.leases import Leases
from rlkit.buffer.notices import Notices
from rlkit.buffer.payloads import RecordFiles, RecordRows, decode, encode
from rlkit.buffer.protocol import BufferStats, GroupRequest, at_least, require
from rlkit.buffer.recovery import Checkpoints
from rlkit.buffer.snapshots import Snapshots
from rlkit.buffer.tables import OPEN, UNENDED, UNLEASED, UPDATE_GROUP, groups, meta, of, slices, versions
from rlkit.types import Group, GroupState, Prompt, Rollout, Verdict


class SqlBuffer(Leases, Checkpoints, Snapshots, Notices):
    """What learner and rollout workers rely on; each process opens its own.

    `prompts_per_step` and `max_staleness`, P and S of the admission bound, are fixed for a database's life;
    `slice_samples` is the largest slice of groups this process requests; `clock`, in unix seconds, ends leases. A
    PostgreSQL database holds any number of runs, and their payloads; beside SQLite, these are files in `payload_dir`.
    Raises BufferError for a setting out of range, or see Database.
    """

    def __init__(
        self, url: str, *, payload_dir: str | Path, prompts_per_step: int, max_staleness: int, slice_samples: int,
        run: str = "run", clock: Callable[[], float] = time.time,
    ) -> None:  # fmt: skip
        at_least("prompts_per_step", prompts_per_step, 1)
        at_least("max_staleness", max_staleness, 0)
        at_least("slice_samples", slice_samples, 1)
        self._clock = clock
        self._slice_samples = slice_samples
        self._db = Database(url, run, prompts_per_step=prompts_per_step, max_staleness=max_staleness, now=clock())
        self._payloads = RecordFiles(Path(payload_dir)) if self._db.is_file else RecordRows()

    def capacity(self) -> int:
        """How many further ordinals may be requested now (>= 0)."""
        with self._db.read() as connection:
            return tables.capacity(tables.position(connection))

    def request(self, requests: Sequence[GroupRequest]) -> None:
        """Admit groups; ordinals must continue at `next_ordinal` without a gap, within capacity."""
        if not requests:
            return
        for x in requests:
            at_least("samples", x.samples, 1)
        prompts = [encode(x.prompt, f"metadata of prompt {x.prompt.id}") for x in requests]
        with self.leading() as connection:
            now = tables.position(connection)
            ordinals = [x.ordinal for x in requests]
            expected = list(range(now.next_ordinal, now.next_ordinal + len(requests)))
            problem, fix = "ordinals must continue without a gap", "request from stats().next_ordinal on"
            require(ordinals == expected, problem, key="ordinals", value=ordinals, expected=str(expected), fix=fix)
            count, most = len(requests), f"at most capacity() = {tables.capacity(now)}"
            problem, fix = "more than the staleness bound admits now", "wait for a publish, or raise max_staleness"
            require(count <= tables.capacity(now), problem, key="requests", value=count, expected=most, fix=fix)
            fields = {"state": GroupState.REQUESTED, "min_version": now.version, "requested_at": self._clock()}
            size, rows, cut = self._slice_samples, [], []
            for x, prompt in zip(requests, prompts, strict=True):
                place = {"ordinal": x.ordinal}
                rows.append(fields | place | {"samples": x.samples, "prompt_id": x.prompt.id, "prompt": prompt})
                cut += [place | {"start": k, "stop": min(k + size, x.samples)} for k in range(0, x.samples, size)]
            connection.execute(insert(groups), rows)
            connection.execute(insert(slices).values(state=GroupState.REQUESTED), cut)
            connection.execute(update(meta).values(next_ordinal=expected[-1] + 1))

    def take(self, count: int) -> list[Group] | None:
        """The `count` lowest open ordinals as TAKEN, or None while any of them is not SCORED."""
        at_least("count", count, 1)
        with self._db.read() as connection:  # waits for no writer; of scored groups only the learner's verbs change
            rows = _lowest_open(connection, count)
            if rows is None:
                return None
            query = select(slices).where(slices.c.ordinal.in_([row.ordinal for row in rows]))
            parts = connection.execute(query.order_by(slices.c.ordinal, slices.c.start)).all()
            records = self._payloads.read(connection, parts)
        taken, updates = [], []
        pieces = groupby(zip(parts, records, strict=True), lambda x: x[0].ordinal)
        for row, (ordinal, own) in zip(rows, pieces, strict=True):
            rollouts: list[Rollout] = []
            verdicts: list[Verdict] = []
            for part, record in own:
                rollouts += decode(record, list[Rollout])
                verdicts += decode(part.verdicts, list[Verdict])
            pairs = zip(rollouts, verdicts, strict=True)
            known = encode([(v.score, len(r.token_ids)) for r, v in pairs if v.score is not None], "scores")
            updates.append({"at_ordinal": ordinal, "state": GroupState.TAKEN, "outcomes": known})
            taken.append(Group(
                ordinal=ordinal, prompt=decode(row.prompt, Prompt), samples=row.samples,
                rollouts=tuple(rollouts), verdicts=tuple(verdicts),
            ))  # fmt: skip
        with self.leading() as connection:
            _check_states(connection, [row.ordinal for row in rows], (GroupState.SCORED,), "taken")
            connection.execute(UPDATE_GROUP, updates)
        return taken

    def drop(self, ordinals: Sequence[int], reason: str) -> None:
        """Refuse groups, open or taken (DROPPED): their leases are void, and each raises the admission bound by one."""
        require(bool(reason), "a drop needs a reason", key="reason", value=reason)
        with self.leading() as connection:
            _check_states(connection, ordinals, UNENDED, "dropped")
            connection.execute(of(groups, ordinals).values(state=GroupState.DROPPED, drop_reason=reason))
            # scored slices stay: a rollback may bring the group back
            unfinished = of(slices, ordinals).where(slices.c.state != GroupState.SCORED)
            connection.execute(unfinished.values(state=GroupState.DROPPED, **UNLEASED))
            connection.execute(update(meta).values(refused=meta.c.refused + len(ordinals)))

    def publish(self, version: int, trained: Sequence[int]) -> None:
        """All TAKEN groups, `trained`, exactly P (rule R4), become TRAINED by the step that made `version`."""
        with self.leading() as connection:
            now = tables.position(connection)
            at_least("version", version, now.next_version)
            _check_states(connection, trained, (GroupState.TAKEN,), "trained")
            query = select(groups.c.ordinal).where(groups.c.state == GroupState.TAKEN)
            left = sorted(set(connection.execute(query).scalars()) - set(trained))
            problem = "a step trains on every taken group, prompts_per_step of them"
            value, fix = f"{len(trained)} groups; taken besides: {left}", "drop what is left out and take as many again"
            whole = not left and len(trained) == now.prompts_per_step
            require(whole, problem, key="trained", value=value, expected=f"all {now.prompts_per_step} taken", fix=fix)
            connection.execute(of(groups, trained).values(state=GroupState.TRAINED, trained_step=now.step))
            step = now.step + 1
            connection.execute(insert(versions).values(version=version, step=step, published_at=self._clock()))
            connection.execute(update(meta).values(step=step, version=version, next_version=version + 1))

    def history(self, prompt_ids: Collection[str], latest: int) -> dict[str, list[list[tuple[float, int]]]]:
        """(score, tokens) of the scored samples of each prompt's `latest` taken groups, newest first, if any."""
        age = func.row_number().over(partition_by=groups.c.prompt_id, order_by=groups.c.ordinal.desc()).label("age")
        taken = groups.c.prompt_id.in_(prompt_ids) & groups.c.outcomes.is_not(None)
        part = select(groups.c.prompt_id, groups.c.outcomes, age).where(taken).subquery()
        found: dict[str, list[list[tuple[float, int]]]] = {}
        with self._db.read() as connection:
            for name, outcomes, _ in connection.execute(select(part).where(part.c.age <= latest).order_by(part.c.age)):
                found.setdefault(name, []).append(decode(outcomes, list[tuple[float, int]]))
        return found

    def next_version(self) -> int:
        """Smallest version id never used, dead lineages included."""
        with self._db.read() as connection:
            return int(tables.position(connection).next_version)

    def steps_of(self, wanted: Collection[int]) -> dict[int, int]:
        """Step of each version: lag is a difference of steps, as version ids skip after a rollback."""
        query = select(versions.c.version, versions.c.step).where(versions.c.version.in_(wanted))
        with self._db.read() as connection:
            return {version: step for version, step in connection.execute(query)}

    def stats(self) -> BufferStats:
        """Counters for telemetry and `rlkit buffer`."""
        with self._db.view() as connection:
            return tables.stats_of(connection)

    def close(self) -> None:
        """Release connections."""
        self._db.close()


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
