"""Weights by version, for engines in other processes: safetensors files in one folder, listed in the buffer's database.

A version may be served once its row has a checksum, that of the whole file; whoever loads it compares first. A file
stays while its version is the newest, or one that an untrained token may have been sampled from.
"""

import hashlib
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import xxhash
from sqlalchemy import and_, exists, select, update

from rlkit.buffer.database import Database
from rlkit.buffer.protocol import require
from rlkit.buffer.tables import UNENDED, groups, position, slices, versions


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """A complete file of weights. `checksum`: xxh3-128 of the file; `size`: its bytes."""

    version: int
    path: str
    checksum: str
    size: int


def checksum(path: Path) -> str:
    """xxh3-128 of a file, in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, xxhash.xxh3_128).hexdigest()


class Snapshots:
    """The verbs about weights; SqlBuffer adds the others."""

    _db: Database
    _clock: Callable[[], float]

    def stored(self, snapshot: Snapshot) -> None:
        """The file of a live version is complete: engines may load it."""
        mine = versions.c.live & (versions.c.version == snapshot.version)
        with self._db.write() as connection:
            found = connection.execute(update(versions).where(mine).values(asdict(snapshot))).rowcount
            fix = "publish it first; a rollback may have left it behind"
            require(found == 1, "no such live version", key="version", value=snapshot.version, fix=fix)

    def snapshot(self) -> Snapshot | None:
        """The newest live version that may be served; None before the first."""
        live = select(versions).where(versions.c.live, versions.c.checksum.is_not(None))
        with self._db.read() as connection:
            found = connection.execute(live.order_by(versions.c.version.desc()).limit(1)).first()
        return None if found is None else _snapshot(found)

    def discard(self) -> list[Snapshot]:
        """Take the snapshots that no engine and no untrained token needs off the list; their files may be deleted."""
        inside = and_(slices.c.oldest_version <= versions.c.version, slices.c.newest_version >= versions.c.version)
        used = exists().where(inside, slices.c.ordinal == groups.c.ordinal, groups.c.state.in_(UNENDED))
        with self._db.write() as connection:
            newest = self.snapshot()
            kept = {position(connection).version, newest.version if newest else -1}
            listed = select(versions).where(versions.c.checksum.is_not(None), versions.c.version.not_in(kept), ~used)
            found = connection.execute(listed).all()
            gone = update(versions).where(versions.c.version.in_([x.version for x in found]))
            connection.execute(gone.values(path=None, checksum=None, size=None))
        return [_snapshot(x) for x in found]


def _snapshot(row: object) -> Snapshot:
    return Snapshot(**{name: getattr(row, name) for name in Snapshot.__slots__})
