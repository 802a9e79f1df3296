"""The buffer's schema, in SQLAlchemy Core: for SQLite and PostgreSQL alike."""

from typing import Any

import sqlalchemy as sa
from sqlalchemy import BigInteger, Column, Float, ForeignKey, Integer, LargeBinary, String

from rlkit.buffer.protocol import BufferStats
from rlkit.types import GroupState

SCHEMA_VERSION = 6

metadata = sa.MetaData()

meta = sa.Table(
    "meta",
    metadata,
    Column("id", Integer, sa.CheckConstraint("id = 1"), primary_key=True, default=1),
    *(Column(x, Integer, nullable=False) for x in ("schema_version", "prompts_per_step", "max_staleness")),
    *(Column(x, BigInteger, nullable=False, default=0) for x in ("step", "version", "next_ordinal", "refused")),
    *(Column(x, BigInteger, nullable=False, default=0) for x in ("next_lease", "expired_leases", "fenced_writes")),
    Column("learner", BigInteger, nullable=False, default=0),  # how many have gone on with the run: the last one leads
    Column("ended", sa.Boolean, nullable=False, default=False),  # nothing more will be requested
    Column("next_version", BigInteger, nullable=False, default=1),
    Column("committed_step", BigInteger),
)
"""One row: configuration the database was made with, position, counters."""

versions = sa.Table(
    "versions",
    metadata,
    Column("version", BigInteger, primary_key=True, autoincrement=False),
    Column("step", BigInteger, nullable=False),
    Column("live", sa.Boolean, nullable=False, default=True),
    Column("published_at", Float, nullable=False),
    *(Column(x, String) for x in ("path", "checksum")),  # of its snapshot, once that is complete
    Column("size", BigInteger),
    Column("probe", LargeBinary),  # tokens and the learner's log-probs of them
)
"""Every version ever published; `live` is False once a rollback has left it behind."""

groups = sa.Table(
    "groups",
    metadata,
    Column("ordinal", BigInteger, primary_key=True, autoincrement=False),
    Column("state", String(16), nullable=False),
    Column("samples", Integer, nullable=False),
    Column("prompt_id", String, nullable=False),
    Column("prompt", LargeBinary),  # NULL once a checkpoint covers the group
    Column("min_version", ForeignKey("versions.version"), nullable=False),
    Column("oldest_version", BigInteger),  # of its tokens, once scored
    Column("trained_step", BigInteger),
    Column("drop_reason", String),
    Column("requested_at", Float, nullable=False),
    Column("scored_at", Float),
    Column("outcomes", LargeBinary),  # (score, tokens) of its scored samples, once it was taken
    sa.Index("groups_by_state", "state", "ordinal"),
    sa.Index("groups_by_prompt", "prompt_id", "ordinal"),
)
"""One row an ordinal; rows of trained groups stay as the ledger."""

slices = sa.Table(
    "slices",
    metadata,
    Column("ordinal", ForeignKey("groups.ordinal", ondelete="CASCADE"), primary_key=True),
    Column("start", Integer, primary_key=True, autoincrement=False),
    Column("stop", Integer, nullable=False),
    Column("state", String(16), nullable=False),
    Column("epoch", Integer, nullable=False, default=0),
    Column("lease_id", BigInteger),
    Column("worker_id", String),
    Column("deadline", Float),
    *(Column(x, BigInteger) for x in ("oldest_version", "newest_version")),
    Column("verdicts", LargeBinary),
    sa.Index("slices_by_state", "state", "ordinal", "start"),
    sa.Index("slices_by_lease", "lease_id", unique=True),
)
"""One row a slice of a group's samples; removed once a checkpoint covers the group."""

payloads = sa.Table(
    "payloads",
    metadata,
    *(Column(x, BigInteger, primary_key=True, autoincrement=False) for x in ("ordinal", "start", "lease_id")),
    Column("record", LargeBinary, nullable=False),
)
"""One row a slice that was handed in, in PostgreSQL; empty in SQLite, beside which payloads are files."""

evaluations = sa.Table(
    "evaluations",
    metadata,
    Column("step", BigInteger, primary_key=True, autoincrement=False),
    Column("version", BigInteger, nullable=False),
    Column("metrics", LargeBinary),
)
"""One row an evaluation that was asked for; its metrics once they are there."""

workers = sa.Table(
    "workers",
    metadata,
    Column("name", String, primary_key=True),
    Column("seen_at", Float, nullable=False),
    Column("status", LargeBinary, nullable=False),
)
"""One row a worker process: what it last said of itself."""

OPEN = (GroupState.REQUESTED, GroupState.LEASED, GroupState.GENERATED, GroupState.SCORED)  # before it is taken
UNENDED = (*OPEN, GroupState.TAKEN)
IN_WORK = (GroupState.LEASED, GroupState.GENERATED)  # of a slice that needs a living lease
UPDATE_GROUP = sa.update(groups).where(groups.c.ordinal == sa.bindparam("at_ordinal"))  # built once: it is busy
UNLEASED: dict[str, Any] = dict.fromkeys(x.name for x in slices.c if x.nullable)  # the epoch stays, the next is higher


def position(connection: sa.Connection) -> Any:
    """The row of `meta`."""
    return connection.execute(sa.select(meta)).one()


def bound(place: Any, step: int, refused: int) -> int:
    """The admission bound at `step` with so many drops; `place`: the row of `meta`."""
    return int((step + place.max_staleness + 1) * place.prompts_per_step + refused)


def capacity(place: Any) -> int:
    """Ordinals that may be requested now."""
    return max(0, bound(place, place.step, place.refused) - int(place.next_ordinal))


def stats_of(connection: sa.Connection) -> BufferStats:
    """Counts of a snapshot."""
    now = position(connection)
    by_state = sa.select(groups.c.state, sa.func.count()).group_by(groups.c.state)
    by_reason = sa.select(groups.c.drop_reason, sa.func.count()).where(groups.c.state == GroupState.DROPPED)
    return BufferStats(
        states={str(state): 0 for state in GroupState} | {state: n for state, n in connection.execute(by_state)},
        dropped_reasons={reason: n for reason, n in connection.execute(by_reason.group_by(groups.c.drop_reason))},
        step=now.step, version=now.version, next_ordinal=now.next_ordinal,
        expired_leases=now.expired_leases, fenced_writes=now.fenced_writes,
    )  # fmt: skip


def of(table: sa.Table, ordinals: Any) -> sa.Update:
    """An update of the rows of these groups."""
    return sa.update(table).where(table.c.ordinal.in_(ordinals))
