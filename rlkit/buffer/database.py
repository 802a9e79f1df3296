"""Opening the buffer's database, and its two kinds of transaction: read and write. docs/buffer.md, Storage."""

import os
import re
import sqlite3
import time
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import psutil
from sqlalchemy import Connection, create_engine, event, insert, select
from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError, SQLAlchemyError

from rlkit.buffer.tables import SCHEMA_VERSION, meta, metadata, versions
from rlkit.errors import BufferError

BUSY_TIMEOUT_S = 30.0
_NETWORK = re.compile(
    r"^(nfs\d?|cifs|smb\d?|smbfs|9p|afs|ceph|lustre|gpfs|beegfs\w*|glusterfs|ocfs2|gfs2?|orangefs"
    r"|pvfs2|davfs|panfs|wekafs|fuse\.(?!fuse-overlayfs|ext|ntfs|lxcfs).*)$"
)


class Database:
    """A SQLite database of the buffer's schema, made if there is none.

    BufferError: no SQLite file's URL, a network filesystem, damage, or made with another schema version, P or S.
    """

    def __init__(self, url: str, *, prompts_per_step: int, max_staleness: int, now: float) -> None:
        self.path = sqlite_path(url)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        refuse_network_filesystem(self.path, psutil.disk_partitions(all=True))
        self._pid = os.getpid()
        arguments = {"timeout": BUSY_TIMEOUT_S, "isolation_level": None}
        self._engine = create_engine(f"sqlite:///{self.path}", connect_args=arguments)
        event.listen(self._engine, "connect", _configure)
        try:
            self._create(prompts_per_step, max_staleness, now)
        except BaseException:  # raised again: whatever it is, no connection stays
            self.close()
            raise

    def read(self) -> AbstractContextManager[Connection]:
        """A snapshot; waits for nobody."""
        return self._transaction("BEGIN")

    def write(self) -> AbstractContextManager[Connection]:
        """The one writer; committed on exit, undone on an exception."""
        return self._transaction("BEGIN IMMEDIATE")

    def close(self) -> None:
        """Close connections; idempotent."""
        self._engine.dispose()

    @contextmanager
    def _transaction(self, begin: str) -> Iterator[Connection]:
        if self._pid != os.getpid():
            fix = "open it again in this process: SQLite connections do not survive a fork"
            raise self._error("this buffer was opened by the parent process", fix)
        try:
            with self._engine.begin() as connection:
                connection.exec_driver_sql(begin)
                yield connection
        except (SQLAlchemyError, sqlite3.Error) as error:
            fix = f"look for a full disk, or a process that held it for {BUSY_TIMEOUT_S:g} s; move a damaged file aside"
            raise self._error(f"the database failed: {getattr(error, 'orig', None) or error}", fix) from error

    def _error(self, problem: str, fix: str) -> BufferError:
        return BufferError(problem, key="buffer", value=str(self.path), fix=fix)

    def _create(self, prompts_per_step: int, max_staleness: int, now: float) -> None:
        with self.write() as connection:
            problems = connection.exec_driver_sql("PRAGMA quick_check").scalars().all()
            if problems != ["ok"]:
                fix = "move it and its payloads aside and resume from the checkpoint"
                raise self._error(f"the database is damaged: {problems[0]}", fix)
            metadata.create_all(connection)
            wanted = dict(prompts_per_step=prompts_per_step, max_staleness=max_staleness, schema_version=SCHEMA_VERSION)
            if connection.execute(select(meta.c.id)).first() is None:
                connection.execute(insert(versions).values(version=0, step=0, published_at=now))
                connection.execute(insert(meta).values(wanted))
            row = connection.execute(select(meta)).mappings().one()
        for key, value in wanted.items():
            if row[key] != value:
                fix = f"set {key}={row[key]}, or start a new run folder"
                problem = f"the buffer {self.path} was made with {key} = {row[key]}"
                raise BufferError(problem, key=key, value=value, expected=str(row[key]), fix=fix)


def sqlite_path(url: str) -> Path:
    """File of a `sqlite:///...` URL; BufferError for anything else."""
    try:
        parsed = make_url(url)
        file = parsed.database if parsed.get_backend_name() == "sqlite" else None
    except ArgumentError:
        file = None
    if not file or file == ":memory:" or file.startswith("file:"):
        problem = "the buffer must be a SQLite file: other processes open it too"
        expected = "sqlite:///path/to/buffer.db; leave it out for a file in the run folder"
        raise BufferError(problem, key="buffer.url", value=url, expected=expected)
    return Path(file).absolute()


def refuse_network_filesystem(path: Path, mounts: Iterable[Any]) -> None:
    """BufferError if `path` is on a network filesystem, by `mounts` as psutil lists them."""
    kinds = {Path(x.mountpoint): x.fstype for x in mounts}  # of mounts on one point the last one listed lies on top
    kind = next((kinds[x] for x in path.resolve().parents if x in kinds), "")
    if _NETWORK.match(kind):
        problem = f"SQLite would lose data on a network filesystem ({kind})"
        fix = "set buffer.url=sqlite:////local/disk/buffer.db, or output_dir to a local disk"
        raise BufferError(problem, key="buffer.url", value=str(path), fix=fix)


def _configure(connection: sqlite3.Connection, _record: Any) -> None:
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
