"""What a run's buffer holds, as text, during the run or after it: reads a snapshot and writes nothing."""

import time
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
from rlkit.buffer.tables import IN_WORK, capacity, groups, position, slices, stats_of, versions
from rlkit.errors import BufferError
from rlkit.types import GroupState


def view(run_dir: Path, now: float) -> Group:
    """The buffer of a run folder at `now` (unix seconds), for rich; BufferError: there is none, or it is unreadable."""
    config = run_dir / "config.yaml"
    url = OmegaConf.select(OmegaConf.load(config), "buffer.url") if config.exists() else None
    path = run_dir / "buffer.db" if url is None else sqlite_path(url)
    if not path.exists():
        fix = "name the folder of a training run, such as outputs/run"
        raise BufferError("this run has no buffer", key="run", value=str(run_dir), expected=f"a file {path}", fix=fix)
    engine = create_engine(f"sqlite:///file:{quote(str(path.absolute()))}?uri=true&mode=ro")
    try:
        with engine.connect() as connection:
            connection.exec_driver_sql("BEGIN")  # one snapshot for all that follows
            return Group(Text(str(path)), *_contents(connection, now))
    except DatabaseError as error:
        fix = f"if its folder is read-only, copy {path.name} and {path.name}-wal to one you can write to"
        raise BufferError(f"cannot be read: {error.orig}", key="buffer", value=str(path), fix=fix) from error
    finally:
        engine.dispose()


def _contents(connection: Connection, now: float) -> list[Text | Table]:
    place, stats = position(connection), stats_of(connection)
    committed = "never" if place.committed_step is None else f"at step {place.committed_step}"
    dead = connection.execute(select(func.count()).select_from(versions).where(~versions.c.live)).scalar_one()
    head = (
        f"step {place.step}, version {place.version} ({dead} dead versions), committed {committed}\n"
        f"next ordinal {place.next_ordinal}, {capacity(place)} more admitted (max_staleness {place.max_staleness})\n"
        f"{place.expired_leases} expired leases, {place.fenced_writes} fenced writes"
    )
    lag = groups.c.trained_step - versions.c.step  # steps from a group's oldest token to training
    lags = select(lag, func.count()).join(versions, versions.c.version == groups.c.oldest_version)
    lags = lags.where(groups.c.state == GroupState.TRAINED).group_by(lag).order_by(lag)
    samples, first = func.sum(slices.c.stop - slices.c.start), func.min(slices.c.deadline) - now
    workers = select(slices.c.worker_id, func.count(), samples, func.printf("%.0f s", first))
    workers = workers.where(slices.c.state.in_(IN_WORK)).group_by(slices.c.worker_id)
    seconds = func.coalesce(groups.c.scored_at, now) - groups.c.requested_at
    slow = select(groups.c.ordinal, groups.c.prompt_id, groups.c.state, func.printf("%.1f s", seconds))
    slow = slow.where(groups.c.state != GroupState.DROPPED).order_by(seconds.desc(), groups.c.ordinal).limit(10)
    shown: list[Text | Table] = [Text(head)]
    for title, columns, rows in (
        ("groups", ("state", "groups"), stats.states.items()),
        ("dropped", ("reason", "groups"), stats.dropped_reasons.items()),
        ("staleness of trained groups", ("lag", "groups"), connection.execute(lags)),
        ("leases", ("worker", "slices", "samples", "first expires in"), connection.execute(workers)),
        ("slowest prompts", ("ordinal", "prompt", "state", "request to score"), connection.execute(slow)),
    ):
        table = Table(*columns, title=title, title_justify="left", box=SIMPLE_HEAD, min_width=len(title))
        for row in rows:
            table.add_row(*(Text(str(value)) for value in row))
        shown += [table] if table.row_count else []
    return shown


def main(run_dir: Path) -> None:
    """Print the buffer of a run folder."""
    Console().print(view(run_dir, time.time()))
