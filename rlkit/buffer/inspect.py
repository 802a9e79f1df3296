"""What a run's buffer holds, as text, during the run or after it: reads a snapshot and writes nothing."""

import os
import sqlite3
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from omegaconf import OmegaConf
from rich.box import SIMPLE_HEAD
from rich.console import Console, Group
from rich.table import Table
from rich.text import Text
from sqlalchemy import Connection, create_engine, func, select
from sqlalchemy.exc import DatabaseError

from rlkit.buffer.database import sqlite_path
from rlkit.buffer.protocol import BufferStats
from rlkit.buffer.sql import read_stats
from rlkit.buffer.tables import IN_WORK, capacity, groups, position, slices, versions
from rlkit.errors import BufferError
from rlkit.types import GroupState

SLOWEST = 10


@dataclass(frozen=True, slots=True, kw_only=True)
class BufferView:
    """A snapshot of a buffer.

    lags: trained groups by steps from their oldest token to training. workers: (worker, leased slices, samples,
    seconds until the first lease expires). slowest: (ordinal, prompt id, state, seconds from request to last verdict).
    """

    path: Path
    stats: BufferStats
    dead_versions: int
    capacity: int
    max_staleness: int
    committed_step: int | None
    lags: dict[int, int]
    workers: Sequence[tuple[str, int, int, float]]
    slowest: Sequence[tuple[int, str, str, float]]
    payload_bytes: int


def read_view(run_dir: Path, now: float) -> BufferView:
    """Snapshot of the buffer of a run folder; BufferError if there is none or it cannot be read."""
    config = run_dir / "config.yaml"
    url = OmegaConf.select(OmegaConf.load(config), "buffer.url") if config.exists() else None
    path = run_dir / "buffer.db" if url is None else sqlite_path(url)
    if not path.exists():
        fix = "name the folder of a training run, such as outputs/run"
        raise BufferError("this run has no buffer", key="run", value=str(run_dir), expected=f"a file {path}", fix=fix)
    # SQLite keeps a file beside an open database; one that was closed (no -wal) can be read without.
    fixed = not os.access(path.parent, os.W_OK, effective_ids=os.access in os.supports_effective_ids)
    closed = not path.with_name(path.name + "-wal").exists()
    uri = f"file:{quote(str(path.absolute()))}?mode=ro" + ("&immutable=1" if fixed and closed else "")
    engine = create_engine("sqlite://", creator=lambda: sqlite3.connect(uri, uri=True))
    try:
        with engine.connect() as connection:
            connection.exec_driver_sql("BEGIN")  # one snapshot for all that follows
            return _view(connection, path, run_dir / "payloads", now)
    except DatabaseError as error:
        problem = f"the buffer cannot be read: {error.orig}" + (" (its folder is read-only)" if fixed else "")
        mend = f"copy {path.name} and {path.name}-wal to a folder you can write to" if fixed else None
        raise BufferError(problem, key="buffer", value=str(path), fix=mend) from error
    finally:
        engine.dispose()


def _view(connection: Connection, path: Path, payloads: Path, now: float) -> BufferView:
    place = position(connection)
    lag = groups.c.trained_step - versions.c.step
    lags = select(lag, func.count()).join(versions, versions.c.version == groups.c.oldest_version)
    lags = lags.where(groups.c.state == GroupState.TRAINED).group_by(lag).order_by(lag)
    samples, first = func.sum(slices.c.stop - slices.c.start), func.min(slices.c.deadline) - now
    workers = select(slices.c.worker_id, func.count(), samples, first)
    workers = workers.where(slices.c.state.in_(IN_WORK)).group_by(slices.c.worker_id)
    seconds = func.coalesce(groups.c.scored_at, now) - groups.c.requested_at
    slow = select(groups.c.ordinal, groups.c.prompt_id, groups.c.state, seconds)
    slow = slow.where(groups.c.state != GroupState.DROPPED).order_by(seconds.desc(), groups.c.ordinal).limit(SLOWEST)
    dead = select(func.count()).select_from(versions).where(~versions.c.live)
    return BufferView(
        path=path,
        stats=read_stats(connection),
        dead_versions=connection.execute(dead).scalar_one(),
        capacity=capacity(place),
        max_staleness=place.max_staleness,
        committed_step=place.committed_step,
        lags={steps: count for steps, count in connection.execute(lags)},
        workers=[tuple(row) for row in connection.execute(workers)],
        slowest=[tuple(row) for row in connection.execute(slow)],
        payload_bytes=sum(_size(x) for x in payloads.glob("*.segment")),
    )


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:  # a commit of the running learner removed it meanwhile
        return 0


def render(view: BufferView) -> Group:
    """The snapshot for a terminal."""
    stats = view.stats
    committed = "never" if view.committed_step is None else f"at step {view.committed_step}"
    head = (
        f"{view.path}\nstep {stats.step}, version {stats.version} ({view.dead_versions} dead versions), "
        f"committed {committed}\nnext ordinal {stats.next_ordinal}, {view.capacity} more admitted "
        f"(max_staleness {view.max_staleness}), payloads {view.payload_bytes / 2**20:.1f} MiB\n"
        f"{stats.expired_leases} expired leases, {stats.fenced_writes} fenced writes"
    )
    workers = [(*row[:3], f"{row[3]:.0f} s") for row in view.workers]
    slowest = [(*row[:3], f"{row[3]:.1f} s") for row in view.slowest]
    sections: dict[str, tuple[tuple[str, ...], Iterable[tuple[object, ...]]]] = {
        "groups": (("state", "groups"), stats.states.items()),
        "dropped": (("reason", "groups"), stats.dropped_reasons.items()),
        "staleness of trained groups": (("lag", "groups"), view.lags.items()),
        "leases": (("worker", "slices", "samples", "first expires in"), workers),
        "slowest prompts": (("ordinal", "prompt", "state", "request to score"), slowest),
    }
    tables = []
    for title, (columns, rows) in sections.items():
        table = Table(*columns, title=title, title_justify="left", box=SIMPLE_HEAD, min_width=len(title))
        for row in rows:
            table.add_row(*(Text(str(value)) for value in row))
        tables += [table] if table.row_count else []
    return Group(Text(head), *tables)


def main(run_dir: Path) -> None:
    """Print the buffer of a run folder."""
    Console().print(render(read_view(Path(run_dir), time.time())))
