"""`rlkit buffer RUN`: what it shows, live and afterwards."""

from __future__ import annotations

import io
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from buffer_work import Clock, finish, open_at, request, sample_all, train
from rich.console import Console

from rlkit.buffer.inspect import main, read_view, render
from rlkit.errors import BufferError


def test_a_live_buffer(tmp_path: Path, clock: Clock) -> None:
    buffer = open_at(tmp_path, clock)
    request(buffer, 4, samples=2)
    clock.now += 3.0
    sample_all(buffer)
    train(buffer)
    buffer.drop([2], "no signal")
    request(buffer, 3, samples=4)
    leases = buffer.lease("worker-7", 6, 60.0)
    clock.now += 20.0
    view = read_view(tmp_path, clock.now)
    assert (view.stats.step, view.stats.version, view.stats.next_ordinal, view.capacity) == (1, 1, 7, 0)
    assert view.stats.states["leased"] == 2 and view.stats.states["trained"] == 2
    assert (view.lags, view.stats.dropped_reasons) == ({0: 2}, {"no signal": 1})
    assert view.workers == [("worker-7", 3, 6, 40.0)]
    assert [(x[0], x[3]) for x in view.slowest[:4]] == [(4, 20.0), (5, 20.0), (6, 20.0), (0, 3.0)]
    finish(buffer, leases)
    sample_all(buffer)
    train(buffer)
    assert read_view(tmp_path, clock.now).lags == {0: 3, 1: 1}
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(render(view))
    shown = console.export_text()
    for expected in ("step 1, version 1", "committed never", "no signal", "worker-7", "p4", "40 s"):
        assert expected in shown
    buffer.close()


def test_afterwards(tmp_path: Path, clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    buffer = open_at(tmp_path, clock)
    request(buffer, 4, samples=2)
    sample_all(buffer)
    train(buffer)
    buffer.commit(buffer.watermark())
    buffer.close()
    before = (tmp_path / "buffer.db").read_bytes()
    main(tmp_path)
    assert "committed at step 1" in capsys.readouterr().out
    assert (tmp_path / "buffer.db").read_bytes() == before


def test_a_database_elsewhere(tmp_path: Path, clock: Clock) -> None:
    open_at(tmp_path / "fast", clock).close()
    run = tmp_path / "run"
    run.mkdir()
    url = f"sqlite:///{tmp_path}/fast/buffer.db"
    (run / "config.yaml").write_text(f"buffer:\n  url: {url}\n")
    assert read_view(run, clock.now).capacity == 4


def test_no_buffer(tmp_path: Path) -> None:
    with pytest.raises(BufferError, match="no buffer"):
        read_view(tmp_path, 0.0)
    (tmp_path / "buffer.db").write_text("nothing of the kind" * 100)
    with pytest.raises(BufferError, match="not a database"):
        read_view(tmp_path, 0.0)


@contextmanager
def read_only(folder: Path) -> Iterator[None]:
    """Make a folder one that this process cannot write to, root or not."""
    folder.chmod(0o555)
    root = os.geteuid() == 0
    try:
        if root:
            os.seteuid(65534)
        yield
    finally:
        if root:
            os.seteuid(0)
        folder.chmod(0o755)


@pytest.fixture
def open_folder() -> Iterator[Callable[[], Path]]:
    """Makes folders that everybody may enter (tmp_path's parents are private)."""
    made: list[Path] = []

    def make() -> Path:
        made.append(Path(tempfile.mkdtemp()))
        made[-1].chmod(0o755)
        return made[-1]

    yield make
    for folder in made:
        shutil.rmtree(folder)


def test_in_a_read_only_folder(open_folder: Callable[[], Path], clock: Clock) -> None:
    """What is closed is read; what a dead process left open is refused with a way out."""
    live = open_folder()
    buffer = open_at(live, clock)
    request(buffer, 4, samples=2)
    torn = open_folder()
    for name in ("buffer.db", "buffer.db-wal"):
        shutil.copy(live / name, torn)
        (torn / name).chmod(0o644)
    buffer.close()
    before = read_view(live, clock.now)
    with read_only(live):
        assert read_view(live, clock.now) == before
    with read_only(torn), pytest.raises(BufferError, match=r"read-only[\s\S]*copy buffer\.db and buffer\.db-wal"):
        read_view(torn, clock.now)
    assert read_view(torn, clock.now).stats.states == before.stats.states
