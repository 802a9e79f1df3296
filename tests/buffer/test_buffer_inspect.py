"""`rlkit buffer RUN`: what it shows, live and afterwards."""

from __future__ import annotations

import io
import itertools
from pathlib import Path

import pytest
from buffer_work import Clock, finish, open_at, request, sample_all, train
from rich.console import Console

from rlkit.buffer.inspect import main, view
from rlkit.errors import BufferError


def shown(run: Path, clock: Clock) -> str:
    console = Console(width=300, record=True, file=io.StringIO())
    console.print(view(run, clock.now))
    return console.export_text()


def rows(text: str, title: str) -> dict[str, list[str]]:
    """First word -> other words, of each row of a table."""
    lines = iter(line.strip() for line in text.splitlines())
    while next(lines) != title:
        pass
    body = itertools.takewhile(bool, itertools.islice(itertools.dropwhile(lambda x: "\u2500" not in x, lines), 1, None))
    return {first: rest for first, *rest in (line.split() for line in body)}


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
    text = shown(tmp_path, clock)
    assert "step 1, version 1 (0 dead versions), committed never" in text
    assert "next ordinal 7, 0 more admitted (max_staleness 1)" in text
    assert rows(text, "groups")["leased"] == ["2"] and rows(text, "groups")["trained"] == ["2"]
    assert rows(text, "dropped") == {"no": ["signal", "1"]}
    assert rows(text, "staleness of trained groups") == {"0": ["2"]}
    assert rows(text, "leases") == {"worker-7": ["3", "6", "40.0", "s"]}
    slowest = rows(text, "slowest prompts")
    assert [*slowest][:4] == ["4", "5", "6", "0"]
    assert (slowest["4"], slowest["0"]) == (["p4", "leased", "20.0", "s"], ["p0", "trained", "3.0", "s"])
    finish(buffer, leases)
    sample_all(buffer)
    train(buffer)
    assert rows(shown(tmp_path, clock), "staleness of trained groups") == {"0": ["3"], "1": ["1"]}
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
    assert "4 more admitted" in shown(run, clock)


def test_no_buffer(tmp_path: Path) -> None:
    with pytest.raises(BufferError, match="no buffer"):
        view(tmp_path, 0.0)
    (tmp_path / "buffer.db").write_text("nothing of the kind" * 100)
    with pytest.raises(BufferError, match="not a database"):
        view(tmp_path, 0.0)
