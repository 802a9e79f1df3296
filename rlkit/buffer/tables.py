"""The buffer's schema, in SQLAlchemy Core: SQLite now, and nothing in it PostgreSQL lacks."""

from __future__ import annotations

from sqlalchemy import (
    BigInteger,
    Boolean,
    CheckConstraint,
    Column,
    Float,
    ForeignKey,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    String,
    Table,
)

SCHEMA_VERSION = 1

metadata = MetaData()

meta = Table(
    "meta",
    metadata,
    Column("id", Integer, CheckConstraint("id = 1"), primary_key=True),
    Column("schema_version", Integer, nullable=False),
    Column("prompts_per_step", Integer, nullable=False),
    Column("max_staleness", Integer, nullable=False),
    Column("step", BigInteger, nullable=False),
    Column("version", BigInteger, nullable=False),
    Column("next_version", BigInteger, nullable=False),
    Column("next_ordinal", BigInteger, nullable=False),
    Column("refused", BigInteger, nullable=False),
    Column("next_lease", BigInteger, nullable=False),
    Column("committed_step", BigInteger),
    Column("expired_leases", BigInteger, nullable=False),
    Column("fenced_writes", BigInteger, nullable=False),
)
"""One row: configuration the database was made with, position, counters."""

versions = Table(
    "versions",
    metadata,
    Column("version", BigInteger, primary_key=True, autoincrement=False),
    Column("step", BigInteger, nullable=False),
    Column("live", Boolean, nullable=False),
    Column("published_at", Float, nullable=False),
)
"""Every version ever published; `live` is False once a rollback has left it behind."""

groups = Table(
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
    Index("groups_by_state", "state", "ordinal"),
)
"""One row an ordinal; rows of trained groups stay as the ledger."""

slices = Table(
    "slices",
    metadata,
    Column("ordinal", ForeignKey("groups.ordinal", ondelete="CASCADE"), primary_key=True),
    Column("start", Integer, primary_key=True, autoincrement=False),
    Column("stop", Integer, nullable=False),
    Column("state", String(16), nullable=False),
    Column("epoch", Integer, nullable=False),
    Column("lease_id", BigInteger),
    Column("worker_id", String),
    Column("deadline", Float),
    Column("segment", String),
    Column("offset", BigInteger),
    Column("length", BigInteger),
    Column("oldest_version", BigInteger),
    Column("newest_version", BigInteger),
    Column("verdicts", LargeBinary),
    Index("slices_by_state", "state", "ordinal", "start"),
    Index("slices_by_lease", "lease_id", unique=True),
)
"""One row a slice of a group's samples; removed once a checkpoint covers the group."""
