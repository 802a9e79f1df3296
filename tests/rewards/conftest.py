"""Shared samples; puts `plugins/` on the path as a user's own code would be."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from rewards import Sample

WORKERS = 2  # of the pools that several tests share

sys.path.insert(0, str(Path(__file__).parent / "plugins"))


@pytest.fixture
def sample() -> Callable[..., Sample]:
    """Make a sample from a completion and whatever else matters to the test."""

    def make(completion: str = "", reference: str | None = None, **more: Any) -> Sample:
        values = {"prompt": "", "metadata": {}, "finish_reason": "stop", "completion_tokens": 1}
        return Sample(completion=completion, reference=reference, **{**values, **more})

    return make


@pytest.fixture(autouse=True)
def no_process_left() -> Iterator[None]:
    """Every test ends with no descendant it did not start with; pools that outlive it keep a child a worker."""
    before = _descendants()
    yield
    deadline = time.monotonic() + 5
    while (left := _left(before)) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not left, f"processes left behind: {left}"


def _descendants() -> dict[int, int]:
    """Pid -> parent's pid."""
    return {process.pid: process.ppid() for process in psutil.Process().children(recursive=True)}


def _left(before: dict[int, int]) -> list[int]:
    fresh = {pid: parent for pid, parent in _descendants().items() if pid not in before}
    waiting = {pid: parent for pid, parent in fresh.items() if parent in before}  # children of an older zygote
    crowded = {parent for parent in waiting.values() if list(_descendants().values()).count(parent) > WORKERS}
    return [pid for pid in fresh if pid not in waiting or waiting[pid] in crowded]
