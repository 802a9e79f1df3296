"""Weights by version, for engines in other processes: safetensors files in one folder, listed in the buffer's database.

A version may be served once its row has a checksum, that of the whole file; whoever loads it compares first. A file
stays while its version is the newest, is to be evaluated, or may have sampled an untrained token.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash
from sqlalchemy import and_, exists, select, update

from rlkit.buffer.database import Database
from rlkit.buffer.payloads import decode, encode
from rlkit.buffer.protocol import require
from rlkit.buffer.tables import UNENDED, evaluations, groups, position, slices, versions


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """A complete file of weights. `checksum`: xxh3-128 of the file; `size`: its bytes.

    `probe`: token ids, and the log-probs that the learner's weights give to all but the first, to compare engines with.
    """

    version: int
    path: str
    checksum: str
    size: int
    probe: tuple[list[int], list[float]] | None = None


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
        fields = {name: getattr(snapshot, name) for name in ("path", "checksum", "size")}
        with self._db.write() as connection:
            probe = None if snapshot.probe is None else encode(snapshot.probe, "probe")
            found = connection.execute(update(versions).where(mine).values(**fields, probe=probe)).rowcount
            fix = "publish it first; a rollback may have left it behind"
            require(found == 1, "no such live version", key="version", value=snapshot.version, fix=fix)

    def snapshot(self, version: int | None = None) -> Snapshot | None:
        """The newest live version that may be served, or that one; None while there is none."""
        live = select(versions).where(versions.c.live, versions.c.checksum.is_not(None))
        if version is not None:
            live = live.where(versions.c.version == version)
        with self._db.read() as connection:
            found = connection.execute(live.order_by(versions.c.version.desc()).limit(1)).first()
        return None if found is None else _snapshot(found)

    def discard(self) -> list[Snapshot]:
        """Take the snapshots that nobody needs any more off the list; their files may be deleted."""
        inside = and_(slices.c.oldest_version <= versions.c.version, slices.c.newest_version >= versions.c.version)
        used = exists().where(inside, slices.c.ordinal == groups.c.ordinal, groups.c.state.in_(UNENDED))
        asked = exists().where(evaluations.c.version == versions.c.version, evaluations.c.metrics.is_(None))
        with self._db.write() as connection:
            newest = self.snapshot()
            kept = {position(connection).version, newest.version if newest else -1}
            needless = versions.c.version.not_in(kept) & ~used & ~(asked & versions.c.live)
            found = connection.execute(select(versions).where(versions.c.checksum.is_not(None), needless)).all()
            gone = update(versions).where(versions.c.version.in_([x.version for x in found]))
            connection.execute(gone.values(path=None, checksum=None, size=None, probe=None))
        return [_snapshot(x) for x in found]

    def listed(self) -> set[str]:
        """Paths of all snapshots on the list."""
        with self._db.read() as connection:
            return set(connection.execute(select(versions.c.path).where(versions.c.path.is_not(None))).scalars())


def _snapshot(row: Any) -> Snapshot:
    probe = None if row.probe is None else decode(row.probe, tuple[list[int], list[float]])
    return Snapshot(version=row.version, path=row.path, checksum=row.checksum, size=row.size, probe=probe)
