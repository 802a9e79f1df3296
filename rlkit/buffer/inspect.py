"""What a run's buffer holds, as text: states, lags, leases, drops, slowest prompts.

Reads a snapshot and writes nothing, so it may be used while the run goes on, and afterwards.
"""

from __future__ import annotations

import sqlite3
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from omegaconf import OmegaConf
from rich.box import SIMPLE_HEAD
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text
from sqlalchemy import Connection, create_engine, func, select
from sqlalchemy.exc import DatabaseError

from rlkit.buffer import admission
from rlkit.buffer.database import sqlite_path
from rlkit.buffer.leases import IN_WORK
from rlkit.buffer.sql import read_stats
from rlkit.buffer.tables import groups, slices, versions
from rlkit.errors import BufferError
from rlkit.types import GroupState

SLOWEST = 10


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerView:
    """Leases of one worker; `seconds_left` of the one that expires first, negative once past."""

    worker_id: str
    leases: int
    samples: int
    seconds_left: float


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptView:
    """A group by the seconds from its request to its last verdict (or till now)."""

    ordinal: int
    prompt_id: str
    state: str
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class BufferView:
    """A snapshot of a buffer. lags: trained groups by steps from their oldest token to training."""

    path: Path
    step: int
    version: int
    dead_versions: int
    next_ordinal: int
    capacity: int
    max_staleness: int
    committed_step: int | None
    states: dict[str, int]
    dropped_reasons: dict[str, int]
    lags: dict[int, int]
    workers: tuple[WorkerView, ...]
    slowest: tuple[PromptView, ...]
    expired_leases: int
    fenced_writes: int
    payload_bytes: int


def read_view(run_dir: Path, now: float) -> BufferView:
    """Snapshot of the buffer of a run folder; BufferError if there is none or it cannot be read."""
    path = run_dir / "buffer.db"
    config = run_dir / "config.yaml"
    if config.exists():
        url = OmegaConf.select(OmegaConf.load(config), "buffer.url")
        path = path if url is None else sqlite_path(url)
    if not path.exists():
        raise BufferError(
            "this run has no buffer",
            key="run",
            value=str(run_dir),
            expected=f"a file {path}",
            fix="name the folder of a training run, such as outputs/run",
        )
    uri = f"file:{quote(str(path.absolute()))}?mode=ro"
    engine = create_engine("sqlite://", creator=lambda: sqlite3.connect(uri, uri=True))
    try:
        with engine.connect() as connection:
            return _view(connection, path, run_dir / "payloads", now)
    except DatabaseError as error:
        raise BufferError(f"the buffer cannot be read: {error.orig}", key="buffer", value=str(path)) from error
    finally:
        engine.dispose()


def render(view: BufferView) -> RenderableType:
    """The snapshot for a terminal."""
    committed = "never" if view.committed_step is None else f"at step {view.committed_step}"
    head = Text(
        f"{view.path}\n"
        f"step {view.step}, version {view.version} ({view.dead_versions} dead versions), "
        f"committed {committed}\n"
        f"next ordinal {view.next_ordinal}, {view.capacity} more admitted "
        f"(max_staleness {view.max_staleness}), payloads {view.payload_bytes / 2**20:.1f} MiB\n"
        f"{view.expired_leases} expired leases, {view.fenced_writes} fenced writes"
    )
    parts: list[RenderableType] = [head]
    parts.append(_table("groups", ("state", "groups"), list(view.states.items())))
    if view.dropped_reasons:
        parts.append(_table("dropped", ("reason", "groups"), list(view.dropped_reasons.items())))
    if view.lags:
        parts.append(_table("staleness of trained groups", ("lag", "groups"), sorted(view.lags.items())))
    if view.workers:
        rows = [(x.worker_id, x.leases, x.samples, f"{x.seconds_left:.0f} s") for x in view.workers]
        parts.append(_table("leases", ("worker", "slices", "samples", "first expires in"), rows))
    if view.slowest:
        slow = [(x.ordinal, x.prompt_id, x.state, f"{x.seconds:.1f} s") for x in view.slowest]
        columns = ("ordinal", "prompt", "state", "request to score")
        parts.append(_table("slowest prompts", columns, slow))
    return Group(*parts)


def main(run_dir: Path) -> None:
    """Print the buffer of a run folder."""
    Console().print(render(read_view(Path(run_dir), time.time())))


def _view(connection: Connection, path: Path, payloads: Path, now: float) -> BufferView:
    connection.exec_driver_sql("BEGIN")  # one snapshot for all that follows
    place = admission.position(connection)
    stats = read_stats(connection)
    trained = groups.c.state == GroupState.TRAINED
    lag_query = (
        select(groups.c.trained_step - versions.c.step, func.count())
        .join(versions, versions.c.version == groups.c.oldest_version)
        .where(trained)
        .group_by(groups.c.trained_step - versions.c.step)
    )
    leased = (
        select(slices.c.worker_id, func.count(), func.sum(slices.c.stop - slices.c.start), func.min(slices.c.deadline))
        .where(slices.c.state.in_(IN_WORK))
        .group_by(slices.c.worker_id)
    )
    seconds = func.coalesce(groups.c.scored_at, now) - groups.c.requested_at
    unfinished = groups.c.state != GroupState.DROPPED
    slow = select(groups.c.ordinal, groups.c.prompt_id, groups.c.state, seconds).where(unfinished)
    dead = select(func.count()).select_from(versions).where(~versions.c.live)
    return BufferView(
        path=path,
        step=stats.step,
        version=stats.version,
        dead_versions=connection.execute(dead).scalar_one(),
        next_ordinal=stats.next_ordinal,
        capacity=admission.capacity(place),
        max_staleness=place.max_staleness,
        committed_step=place.committed_step,
        states=stats.states,
        dropped_reasons=stats.dropped_reasons,
        lags=Counter({lag: count for lag, count in connection.execute(lag_query)}),
        workers=tuple(
            WorkerView(worker_id=worker, leases=count, samples=samples, seconds_left=first - now)
            for worker, count, samples, first in connection.execute(leased)
        ),
        slowest=tuple(
            PromptView(ordinal=ordinal, prompt_id=prompt, state=state, seconds=taken)
            for ordinal, prompt, state, taken in connection.execute(
                slow.order_by(seconds.desc(), groups.c.ordinal).limit(SLOWEST)
            )
        ),
        expired_leases=stats.expired_leases,
        fenced_writes=stats.fenced_writes,
        payload_bytes=sum(_size(x) for x in payloads.glob("*.segment")),
    )


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:  # a commit of the running learner removed it meanwhile
        return 0


def _table(title: str, columns: tuple[str, ...], rows: Sequence[tuple[object, ...]]) -> Table:
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, min_width=len(title))
    for column in columns:
        table.add_column(column)
    for row in rows:
        table.add_row(*(Text(str(value)) for value in row))
    return table
