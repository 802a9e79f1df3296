"""Opening the buffer's database, and its transactions: read, view and write. docs/buffer.md, Storage."""

import os
import re
import sqlite3
import time
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import psutil
from sqlalchemy import URL, Connection, Engine, create_engine, event, insert, select
from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError, SQLAlchemyError

from rlkit.buffer.tables import SCHEMA_VERSION, meta, metadata, versions
from rlkit.errors import BufferError, DatabaseError

# A writer's wait for another one, longer than the supervisor waits for a stopped one; in PostgreSQL also the longest
# that one may hold up others.
BUSY_TIMEOUT_S = 90.0
_NETWORK = re.compile(
    r"^(nfs\d?|cifs|smb\d?|smbfs|9p|afs|ceph|lustre|gpfs|beegfs\w*|glusterfs|ocfs2|gfs2?|orangefs"
    r"|pvfs2|davfs|panfs|wekafs|fuse\.(?!fuse-overlayfs|ext|ntfs|lxcfs).*)$"
)
_LOGIN = re.compile(r"//[^/@\s]+@")
# Of a connection: its host may be cut off or dead without a word. libpq's own limit is over two hours.
ALIVE = {"connect_timeout": 10, "keepalives_idle": 30, "keepalives_interval": 15, "keepalives_count": 4}
ALIVE |= {"tcp_user_timeout": round(BUSY_TIMEOUT_S * 1000)}  # in milliseconds
# One writer at a time, in PostgreSQL for each run; readers see a snapshot and wait for nobody.
READ = {"sqlite": "BEGIN", "postgresql": "BEGIN ISOLATION LEVEL REPEATABLE READ, READ ONLY"}
WRITE = {
    "sqlite": "BEGIN IMMEDIATE",
    "postgresql": "BEGIN; SELECT pg_advisory_xact_lock(hashtextextended(current_setting('search_path'), 0))",
}


class Database:
    """A SQLite file, or the schema `rlkit_<run>` of a PostgreSQL database, with the buffer's tables; made if missing.

    BufferError: another kind of URL, a network filesystem, damage, or made with another schema version, P or S.
    """

    def __init__(self, url: str, run: str, *, prompts_per_step: int, max_staleness: int, now: float) -> None:
        place = parsed(url)
        self._kind, self.name = place.get_backend_name(), shown(place, run)
        self.is_file = self._kind == "sqlite"
        if self.is_file:
            path = Path(self.name)
            path.parent.mkdir(parents=True, exist_ok=True)
            refuse_network_filesystem(path, psutil.disk_partitions(all=True))
        self._pid = os.getpid()
        self._engine = connect(place, run)
        try:
            self._create(run, prompts_per_step, max_staleness, now)
        except BaseException:  # raised again: whatever it is, no connection stays
            self.close()
            raise

    def read(self) -> AbstractContextManager[Connection]:
        """Each statement sees a snapshot of its own; waits for nobody."""
        return self._transaction()

    def view(self) -> AbstractContextManager[Connection]:
        """One snapshot for several statements; waits for nobody."""
        return self._transaction(READ[self._kind])

    def write(self) -> AbstractContextManager[Connection]:
        """The one writer; committed on exit, undone on an exception."""
        return self._transaction(WRITE[self._kind])

    def reuse(self) -> None:
        """Let new rows have the space of deleted ones; SQLite does by itself."""
        if not self.is_file:
            with self._transaction("VACUUM (TRUNCATE FALSE) groups, slices, payloads, meta"):
                pass

    def close(self) -> None:
        """Close connections; idempotent."""
        self._engine.dispose()

    @contextmanager
    def _transaction(self, begin: str = "") -> Iterator[Connection]:
        if self._pid != os.getpid():
            fix = "open it again in this process: connections do not survive a fork"
            raise self._error("this buffer was opened by the parent process", fix)
        try:
            with self._engine.begin() as connection:
                if begin:
                    connection.exec_driver_sql(begin)
                yield connection
        except (SQLAlchemyError, sqlite3.Error) as error:
            fix = f"look for a full disk, or a process that held it for {BUSY_TIMEOUT_S:g} s; move a damaged file aside"
            if not self.is_file:
                fix = f"is the server up and reachable? Nobody may hold up another for {BUSY_TIMEOUT_S:g} s"
            problem = f"the database failed: {getattr(error, 'orig', None) or error}"
            raise DatabaseError(problem, key="buffer", value=self.name, fix=fix) from error

    def _error(self, problem: str, fix: str) -> BufferError:
        return BufferError(problem, key="buffer", value=self.name, fix=fix)

    def _create(self, run: str, prompts_per_step: int, max_staleness: int, now: float) -> None:
        with self.write() as connection:
            if self.is_file:
                problems = connection.exec_driver_sql("PRAGMA quick_check").scalars().all()
                if problems != ["ok"]:
                    fix = "move it and its payloads aside and resume from the checkpoint"
                    raise self._error(f"the database is damaged: {problems[0]}", fix)
            else:
                connection.exec_driver_sql(f'CREATE SCHEMA IF NOT EXISTS "rlkit_{run}"')
            metadata.create_all(connection)
            wanted = dict(prompts_per_step=prompts_per_step, max_staleness=max_staleness, schema_version=SCHEMA_VERSION)
            if connection.execute(select(meta.c.id)).first() is None:
                connection.execute(insert(versions).values(version=0, step=0, published_at=now))
                connection.execute(insert(meta).values(wanted))
            row = connection.execute(select(meta)).mappings().one()
        for key, value in wanted.items():
            if row[key] != value:
                fix = f"set {key}={row[key]}, or start a new run folder"
                problem = f"the buffer {self.name} was made with {key} = {row[key]}"
                raise BufferError(problem, key=key, value=value, expected=str(row[key]), fix=fix)


def parsed(url: str) -> URL:
    """The URL of a SQLite file or a PostgreSQL database; BufferError for anything else."""
    try:
        place = make_url(url)
        kind = place.get_backend_name()
    except ArgumentError:
        place, kind = make_url("none://"), ""
    file = place.database or ""
    if kind == "postgresql":
        return place.set(drivername="postgresql+psycopg")
    if kind != "sqlite" or not file or file == ":memory:" or file.startswith("file:"):
        problem = "the buffer must be a SQLite file or a PostgreSQL database: other processes open it too"
        expected = "sqlite:///path/to/buffer.db, or postgresql://user@host/database; null: a file in the run folder"
        raise BufferError(problem, key="buffer.url", value=_LOGIN.sub("//***@", url), expected=expected)
    return place.set(database=str(Path(file).absolute()))


def shown(place: URL, run: str) -> str:
    """A database in words: its path, or its URL without the password."""
    if place.get_backend_name() == "sqlite":
        return str(place.database)
    return f"{place.render_as_string(hide_password=True)} (rlkit_{run})"


def connect(place: URL, run: str, *, read_only: bool = False) -> Engine:
    """Connections to a database; a transaction begins with one of the statements above."""
    if place.get_backend_name() == "sqlite":
        engine = create_engine(place, connect_args={"timeout": BUSY_TIMEOUT_S, "isolation_level": None})
        if not read_only:
            event.listen(engine, "connect", _configure_sqlite)
        return engine
    try:
        engine = create_engine(place, isolation_level="AUTOCOMMIT", connect_args=ALIVE)
    except ImportError as error:
        fix = "pip install 'rlkit-rlvr[postgresql]'"
        raise BufferError(f"{error}", key="buffer.url", value=shown(place, run), fix=fix) from error

    def configure(connection: Any, _record: Any) -> None:
        connection.execute(f'SET search_path = "rlkit_{run}"')
        for name in ("lock_timeout", "idle_in_transaction_session_timeout"):
            connection.execute(f"SET {name} = '{BUSY_TIMEOUT_S:g}s'")

    event.listen(engine, "connect", configure)
    return engine


def refuse_network_filesystem(path: Path, mounts: Iterable[Any]) -> None:
    """BufferError if `path` is on a network filesystem, by `mounts` as psutil lists them."""
    kinds = {Path(x.mountpoint): x.fstype for x in mounts}  # of mounts on one point the last one listed lies on top
    kind = next((kinds[x] for x in path.resolve().parents if x in kinds), "")
    if _NETWORK.match(kind):
        problem = f"SQLite would lose data on a network filesystem ({kind})"
        fix = "set buffer.url=sqlite:////local/disk/buffer.db, or output_dir to a local disk"
        raise BufferError(problem, key="buffer.url", value=str(path), fix=fix)


def _configure_sqlite(connection: sqlite3.Connection, _record: Any) -> None:
    deadline = time.monotonic() + BUSY_TIMEOUT_S
    while connection.execute("PRAGMA journal_mode").fetchone() != ("wal",):
        try:
            connection.execute("PRAGMA journal_mode = WAL")
        except sqlite3.OperationalError as error:
            # the first switch to WAL does not honour the busy timeout
            if "locked" not in str(error) or time.monotonic() > deadline:
                raise
            time.sleep(0.01)
    connection.execute("PRAGMA synchronous = NORMAL")
    connection.execute("PRAGMA foreign_keys = ON")
