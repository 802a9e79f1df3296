"""Misuse of a verb, as errors a user can act on."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from typing import Any

from sqlalchemy import Connection, select

from rlkit.buffer.protocol import Lease
from rlkit.buffer.tables import groups
from rlkit.errors import BufferError
from rlkit.types import GroupState


def at_least(key: str, value: int, least: int) -> None:
    """BufferError unless `value` is an int of at least `least`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise BufferError(f"{key} is out of range", key=key, value=value, expected=f">= {least}")


def positive(key: str, value: float) -> None:
    """BufferError unless `value` is a finite number above 0."""
    if not (math.isfinite(value) and value > 0):
        raise BufferError(f"{key} is out of range", key=key, value=value, expected="> 0 seconds")


def distinct(key: str, values: Sequence[int]) -> None:
    """BufferError if a value repeats."""
    if len(set(values)) != len(values):
        raise BufferError("named twice", key=key, value=list(values), expected="distinct values")


def covers(lease: Lease, what: str, places: Sequence[tuple[int, int]]) -> None:
    """BufferError unless `places` (ordinal, index) are exactly the lease's samples in order."""
    expected = [(lease.ordinal, index) for index in range(lease.start, lease.stop)]
    if list(places) != expected:
        problem, key = f"the {what} are not those of the lease", f"(ordinal, index) of {what}"
        raise BufferError(problem, key=key, value=list(places), expected=str(expected))


def in_state(row: Any, state: GroupState, verb: str) -> None:
    """BufferError unless a slice is in `state`."""
    if row.state != state:
        problem = f"group {row.ordinal}[{row.start}:{row.stop}] cannot be {verb} now"
        raise BufferError(problem, key="state", value=str(row.state), expected=str(state))


def sampled_under(lease: Lease, spanned: Collection[int], live: Collection[int]) -> None:
    """BufferError unless all tokens' versions are live and not older than the lease allows."""
    bad = sorted(v for v in spanned if v not in live or v < lease.min_version)
    if bad:
        problem = f"group {lease.ordinal}[{lease.start}:{lease.stop}] was sampled under wrong weights"
        expected = f"published, surviving versions from {lease.min_version} on"
        fix = "publish a version before engines serve it; update the engine to lease.min_version before it samples"
        raise BufferError(problem, key="versions", value=bad, expected=expected, fix=fix)


def groups_in(connection: Connection, ordinals: Sequence[int], states: Collection[GroupState], verb: str) -> None:
    """BufferError unless all groups exist, are named once and are in one of `states`."""
    distinct("ordinals", ordinals)
    query = select(groups.c.ordinal, groups.c.state).where(groups.c.ordinal.in_(ordinals))
    found = {ordinal: state for ordinal, state in connection.execute(query)}
    wrong = {x: found.get(x, "never requested") for x in ordinals if found.get(x) not in states}
    if wrong:
        found_states = {ordinal: str(state) for ordinal, state in wrong.items()}
        expected = " or ".join(states)
        raise BufferError(f"these groups cannot be {verb} now", key="ordinals", value=found_states, expected=expected)
