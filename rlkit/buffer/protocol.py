"""Records of the versioned buffer; docs/buffer.md has the terms (ordinal, version, step, lag, watermark)."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rlkit.errors import BufferError
from rlkit.types import Prompt


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupRequest:
    """Ask for `samples` rollouts of `prompt` as group `ordinal`."""

    ordinal: int
    prompt: Prompt
    samples: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Lease:
    """The right to produce samples [start, stop) of one group until `deadline` (unix seconds)."""

    lease_id: int
    epoch: int
    worker_id: str
    ordinal: int
    start: int
    stop: int
    prompt: Prompt
    min_version: int
    deadline: float

    def __str__(self) -> str:
        return f"group {self.ordinal}[{self.start}:{self.stop}]"


class FencedError(BufferError):
    """Writes under leases, `lost`, that are not their slices' newest; those for the call's other leases are kept."""

    def __init__(self, lost: Sequence[Lease]) -> None:
        slices = ", ".join(str(x) for x in lost[:8])
        problem = f"{len(lost)} lease(s) lost: {slices}; another worker may hold these slices now"
        fix = "throw the work away and lease again; if it happens often, renew earlier or raise rollout.lease_timeout_s"
        super().__init__(problem, fix=fix)
        self.lost = tuple(lost)


@dataclass(frozen=True, slots=True, kw_only=True)
class Watermark:
    """What a checkpoint says of the buffer: all below `next_ordinal` = step * P + `refused` is trained or dropped."""

    step: int
    version: int
    next_ordinal: int
    refused: int


@dataclass(frozen=True, slots=True, kw_only=True)
class RollbackReport:
    """What `rollback` did with ordinals. restored: go on as scored; requested_again: for a dead version, missing scores
    or (corrupt) a payload that is damaged or gone; removed: not admitted or not stored now, to be requested again.
    """

    restored: tuple[int, ...]
    requested_again: tuple[int, ...]
    dead_versions: tuple[int, ...]
    corrupt: tuple[int, ...] = ()
    removed: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class BufferStats:
    """Groups by state, and counters since the database was made. The next `request` starts with `next_ordinal`."""

    states: dict[str, int]
    dropped_reasons: dict[str, int]
    step: int
    version: int
    next_ordinal: int
    expired_leases: int
    fenced_writes: int


def require(holds: bool, problem: str, **fields: Any) -> None:
    """BufferError(problem, **fields) unless `holds`."""
    if not holds:
        raise BufferError(problem, **fields)


def at_least(key: str, value: float, least: float, kind: type = int) -> None:
    """BufferError unless `value` is a number of this kind, finite, from `least` up."""
    right = isinstance(value, kind) and not isinstance(value, bool) and least <= value < math.inf
    require(right, f"{key} is out of range", key=key, value=value, expected=f">= {least}")
