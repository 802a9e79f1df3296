"""What a run's buffer holds, as text, during the run or after it: reads a snapshot and writes nothing."""

import time
from pathlib import Path
from urllib.parse import quote

from omegaconf import OmegaConf
from rich.box import SIMPLE_HEAD
from rich.console import Console, Group
from rich.table import Table
from rich.text import Text
from sqlalchemy import Connection, func, select
from sqlalchemy.exc import DatabaseError

from rlkit.buffer.database import READ, connect, parsed, shown
from rlkit.buffer.tables import IN_WORK, capacity, groups, position, slices, stats_of, versions
from rlkit.errors import BufferError
from rlkit.types import GroupState


def view(run_dir: Path, now: float) -> Group:
    """The buffer of a run folder at `now` (unix seconds), for rich; BufferError: there is none, or it is unreadable."""
    config = run_dir / "config.yaml"
    loaded = OmegaConf.load(config) if config.exists() else OmegaConf.create()
    url, run = OmegaConf.select(loaded, "buffer.url"), str(OmegaConf.select(loaded, "name", default="run"))
    place = parsed(url or f"sqlite:///{run_dir / 'buffer.db'}")
    name, fix = shown(place, run), "name the folder of a training run, such as outputs/run"
    if place.get_backend_name() == "sqlite":
        if not Path(name).exists():
            raise BufferError(
                "this run has no buffer", key="run", value=str(run_dir), expected=f"a file {name}", fix=fix
            )
        place = place.set(database=f"file:{quote(name)}", query={"uri": "true", "mode": "ro"})
        fix = f"if its folder is read-only, copy {name} and {name}-wal to one you can write to"
    engine = connect(place, run, read_only=True)
    try:
        with engine.connect() as connection:
            connection.exec_driver_sql(READ[place.get_backend_name()])  # one snapshot for all that follows
            return Group(Text(name), *_contents(connection, now))
    except DatabaseError as error:
        raise BufferError(f"cannot be read: {error.orig}", key="buffer", value=name, fix=fix) from error
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
    workers = select(slices.c.worker_id, func.count(), samples, first)
    workers = workers.where(slices.c.state.in_(IN_WORK)).group_by(slices.c.worker_id)
    seconds = func.coalesce(groups.c.scored_at, now) - groups.c.requested_at
    slow = select(groups.c.ordinal, groups.c.prompt_id, groups.c.state, seconds)
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
            table.add_row(*(Text(f"{x:.1f} s" if isinstance(x, float) else str(x)) for x in row))
        shown += [table] if table.row_count else []
    return shown


def main(run_dir: Path) -> None:
    """Print the buffer of a run folder."""
    Console().print(view(run_dir, time.time()))
