"""Fixtures of the buffer's tests; helpers are in buffer_work.py."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from buffer_work import Buffer, Clock, open_at


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def buffer(tmp_path: Path, clock: Clock) -> Iterator[Buffer]:
    """P = 2, S = 1, slices of 2 samples."""
    opened = open_at(tmp_path, clock)
    yield opened
    opened.close()
