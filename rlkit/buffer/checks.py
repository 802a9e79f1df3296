"""Misuse of a verb, as errors a user can act on: each raises BufferError unless what its name says holds."""

import math
from collections.abc import Collection, Sequence
from typing import Any

from sqlalchemy import Connection, select

from rlkit.buffer.protocol import Lease, require
from rlkit.buffer.tables import groups
from rlkit.types import GroupState


def at_least(key: str, value: int, least: int) -> None:
    whole = isinstance(value, int) and not isinstance(value, bool)
    require(whole and value >= least, f"{key} is out of range", key=key, value=value, expected=f">= {least}")


def positive(key: str, value: float) -> None:
    require(0 < value < math.inf, f"{key} is out of range", key=key, value=value, expected="> 0 seconds")


def distinct(key: str, values: Sequence[int]) -> None:
    require(len(set(values)) == len(values), "named twice", key=key, value=list(values), expected="distinct values")


def covers(lease: Lease, what: str, places: Sequence[tuple[int, int]]) -> None:
    """`places` (ordinal, index) are exactly the lease's samples in order."""
    expected = [(lease.ordinal, index) for index in range(lease.start, lease.stop)]
    problem, key = f"the {what} are not those of the lease", f"(ordinal, index) of {what}"
    require(list(places) == expected, problem, key=key, value=list(places), expected=str(expected))


def in_state(row: Any, state: GroupState, verb: str) -> None:
    problem = f"group {row.ordinal}[{row.start}:{row.stop}] cannot be {verb} now"
    require(row.state == state, problem, key="state", value=str(row.state), expected=str(state))


def sampled_under(lease: Lease, spanned: Collection[int], live: Collection[int]) -> None:
    """All tokens' versions are live and not older than the lease allows."""
    bad = sorted(v for v in spanned if v not in live or v < lease.min_version)
    problem, key = f"{lease} was sampled under wrong weights", "versions"
    expected = f"published, surviving versions from {lease.min_version} on"
    fix = "publish a version before engines serve it; update the engine to lease.min_version before it samples"
    require(not bad, problem, key=key, value=bad, expected=expected, fix=fix)


def groups_in(connection: Connection, ordinals: Sequence[int], states: Collection[GroupState], verb: str) -> None:
    """All groups exist, are named once and are in one of `states`."""
    distinct("ordinals", ordinals)
    query = select(groups.c.ordinal, groups.c.state).where(groups.c.ordinal.in_(ordinals))
    found = {ordinal: str(state) for ordinal, state in connection.execute(query)}
    wrong = {x: found.get(x, "never requested") for x in ordinals if found.get(x) not in states}
    problem, expected = f"these groups cannot be {verb} now", " or ".join(states)
    require(not wrong, problem, key="ordinals", value=wrong, expected=expected)
