"""Fixtures of the buffer's tests; helpers are in buffer_work.py."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent))
sys.path.insert(0, str(Path(__file__).parent))

import buffer_work
import postgres
from buffer_work import Buffer, Clock, open_at


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[str]:
    """URL of a real server; where PostgreSQL is not installed the test is skipped, on CI it fails."""
    if postgres.binaries() is None:
        (pytest.fail if os.environ.get("CI") else pytest.skip)("no PostgreSQL (Debian: postgresql)")
    with tempfile.TemporaryDirectory(prefix="rlkit-postgres-") as name:
        folder = Path(name)  # not pytest's, which another session of it may close to the server's account
        folder.chmod(0o755)
        with postgres.server(folder / "server") as url:
            yield url


@pytest.fixture
def postgresql(postgres_server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What `open_at` opens is a schema of the server, one for each folder."""
    monkeypatch.setattr(buffer_work, "SERVER", postgres_server)


@pytest.fixture(params=["sqlite", "postgresql"])
def database(request: pytest.FixtureRequest) -> str:
    """Both kinds."""
    if request.param == "postgresql":
        request.getfixturevalue("postgresql")
    return str(request.param)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def buffer(tmp_path: Path, clock: Clock) -> Iterator[Buffer]:
    """P = 2, S = 1, slices of 2 samples."""
    opened = open_at(tmp_path, clock)
    yield opened
    opened.close()
