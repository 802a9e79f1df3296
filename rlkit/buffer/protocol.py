"""Terms and records of the versioned buffer. The verbs and their contracts are SqlBuffer's (sql.py).

    ordinal      position of a group in the run's prompt order; never changes, never reused. Its prompt is a pure
                 function of (seed, ordinal).
    version      id of published weights. Strictly increasing over the life of the database, dead lineages included,
                 so that an id never means two things. Version 0 is the start.
    step         number of publishes in the surviving lineage: version 0 is step 0.
    admission    ordinal k may be requested only while k < (step + S + 1) * P + refused, with S = max_staleness,
                 P = prompts_per_step, refused = groups dropped so far. Groups are taken in ordinal order.
    min_version  the version at admission; no token of the group may be older. So: lag of every trained token <= S.
    fencing      every lease has an epoch; a slice accepts writes from its newest lease only.
    commit       a checkpoint is the only commit point; what was trained after it is undone by `rollback`.

The order a learner keeps: take P groups (drop some, take as many again) -> publish(version, those P) -> hand the
weights to the engines. A worker can submit tokens of published, surviving versions only.
"""

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
    """A write under a lease that is not its slice's newest (expired, released, rolled back).

    `lost` holds those leases. What the same call wrote for its other leases is kept.
    """

    def __init__(self, lost: Sequence[Lease]) -> None:
        slices = ", ".join(str(x) for x in lost[:8])
        problem = f"{len(lost)} lease(s) lost: {slices}; another worker may hold these slices now"
        fix = "throw the work away and lease again; if it happens often, renew earlier or raise rollout.lease_timeout_s"
        super().__init__(problem, fix=fix)
        self.lost = tuple(lost)


@dataclass(frozen=True, slots=True, kw_only=True)
class Watermark:
    """What a checkpoint says of the buffer: everything below `next_ordinal` is trained or dropped (`refused` of them).

    Every step trains P groups, so next_ordinal = step * P + refused always holds.
    """

    step: int
    version: int
    next_ordinal: int
    refused: int


@dataclass(frozen=True, slots=True, kw_only=True)
class RollbackReport:
    """What `rollback` did with ordinals.

    restored: go on as scored. requested_again: to be sampled again, for a dead version, missing scores or (corrupt) a
    payload that is damaged or gone. removed: beyond the admission bound or no longer stored; to be requested again.
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
