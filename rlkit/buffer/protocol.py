"""The versioned buffer's contract: what learner and rollout workers may rely on.

Life of a group: REQUESTED -> LEASED -> GENERATED -> SCORED -> TAKEN -> TRAINED, or DROPPED(reason).

Terms
    ordinal      position of a group in the run's prompt order: 0, 1, 2, ... It never changes and is
                 never reused; the prompt of an ordinal is a pure function of (seed, ordinal).
    version      id of published weights. Strictly increasing over the life of the database, dead
                 lineages included, so that an id never means two things. Version 0 is the start.
    step         number of publishes in the surviving lineage: version 0 is step 0.
    admission    ordinal k may be requested only while k < (step + S + 1) * P + refused, with
                 S = max_staleness, P = prompts_per_step, refused = groups dropped so far. Groups
                 are taken in ordinal order, so k is trained at step <= admission step + S.
    min_version  the version at admission. An engine acknowledges it before it samples for k.
                 Together: lag of every trained token <= S.
    fencing      every lease has an epoch; a slice accepts writes from its newest lease only.
    commit       a checkpoint is the only commit point; what was trained after it is undone by
                 `rollback` when the run resumes from it.

The order a learner keeps: take P groups (drop some, take as many again) -> publish(version, those
P) -> hand the weights to the engines. A worker can submit tokens of published, surviving versions
only.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Protocol

from rlkit.errors import BufferError
from rlkit.types import Group, Prompt, Rollout, Verdict


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupRequest:
    """Ask for `samples` rollouts of `prompt` as group `ordinal`."""

    ordinal: int
    prompt: Prompt
    samples: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Lease:
    """The right to produce samples [start, stop) of one group until `deadline` (unix seconds).

    Example: a group of 16 samples with slice size 8 is two leases, (7, 0, 8) and (7, 8, 16).
    """

    lease_id: int
    epoch: int
    worker_id: str
    ordinal: int
    start: int
    stop: int
    prompt: Prompt
    min_version: int
    deadline: float


class FencedError(BufferError):
    """A write under a lease that is not its slice's newest (expired, released, rolled back).

    `lost` holds those leases. What the same call wrote for its other leases is kept.
    """

    def __init__(self, lost: Sequence[Lease]) -> None:
        slices = ", ".join(f"group {x.ordinal}[{x.start}:{x.stop}]" for x in lost[:8])
        super().__init__(
            f"{len(lost)} lease(s) lost: {slices}; another worker may hold these slices now",
            fix="throw the work away and lease again; if it happens often, renew earlier or raise "
            "rollout.lease_timeout_s",
        )
        self.lost = tuple(lost)


@dataclass(frozen=True, slots=True, kw_only=True)
class Watermark:
    """What a checkpoint says of the buffer: everything below `next_ordinal` is covered.

    next_ordinal is the lowest ordinal neither trained nor dropped; refused counts the drops below
    it. Every step trains P groups, so next_ordinal = step * P + refused always holds.
    """

    step: int
    version: int
    next_ordinal: int
    refused: int


@dataclass(frozen=True, slots=True, kw_only=True)
class RollbackReport:
    """What `rollback` did.

    restored: ordinals that go on as scored. requested_again: to be sampled again. corrupt: those of
    requested_again whose stored payload failed its checksum or is gone. removed: beyond the
    admission bound (or no longer stored); the learner requests them again from `next_ordinal` on.
    """

    restored: tuple[int, ...]
    requested_again: tuple[int, ...]
    dead_versions: tuple[int, ...]
    corrupt: tuple[int, ...] = ()
    removed: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class BufferStats:
    """Groups by state, and counters since the database was made.

    next_ordinal: the ordinal the next `request` starts with (not the watermark's).
    """

    states: dict[str, int]
    dropped_reasons: dict[str, int]
    step: int
    version: int
    next_ordinal: int
    expired_leases: int
    fenced_writes: int


class VersionedBuffer(Protocol):
    """See the module docstring. Every verb is one transaction; misuse raises `BufferError`."""

    def capacity(self) -> int:
        """How many further ordinals may be requested now (>= 0)."""

    def request(self, requests: Sequence[GroupRequest]) -> None:
        """Admit groups; ordinals must continue at `next_ordinal` without a gap, within capacity."""

    def lease(self, worker_id: str, max_samples: int, timeout_s: float) -> list[Lease]:
        """Lease slices of the lowest ordinals, at most `max_samples` samples in all; [] if none.

        A slice is never larger than `slice_samples` of the buffer, and one larger than
        `max_samples` is split. Expired leases are reclaimed first.
        """

    def renew(self, leases: Sequence[Lease], timeout_s: float) -> list[Lease]:
        """Extend the deadlines; a lost lease raises FencedError, the others are extended."""

    def submit(self, lease: Lease, rollouts: Sequence[Rollout]) -> None:
        """Store a slice's rollouts (GENERATED). FencedError if the lease is not the newest."""

    def submit_many(self, work: Sequence[tuple[Lease, Sequence[Rollout]]]) -> None:
        """`submit` of several slices at once; lost leases raise after the rest is stored."""

    def score(self, lease: Lease, verdicts: Sequence[Verdict]) -> None:
        """Store a slice's verdicts, in order of sample index; the group is SCORED once all are."""

    def score_many(self, work: Sequence[tuple[Lease, Sequence[Verdict]]]) -> None:
        """`score` of several slices at once; lost leases raise after the rest is stored."""

    def release(self, leases: Sequence[Lease]) -> None:
        """Give leases back: unfinished slices are REQUESTED again, lost leases passed over."""

    def take(self, count: int) -> list[Group] | None:
        """The `count` lowest open ordinals as TAKEN, or None while any of them is not SCORED."""

    def drop(self, ordinals: Sequence[int], reason: str) -> None:
        """Refuse groups (DROPPED): each raises the admission bound by one."""

    def publish(self, version: int, trained: Sequence[int]) -> None:
        """TAKEN groups `trained` become TRAINED by the step that made `version`; step += 1.

        `trained` must be all TAKEN groups and exactly P of them: without that the staleness bound
        does not hold. A taken group not to be trained on is dropped first, and replaced.
        """

    def watermark(self) -> Watermark:
        """State to write into a checkpoint."""

    def commit(self, watermark: Watermark) -> None:
        """The checkpoint is on disk: payloads of groups it covers may be removed."""

    def rollback(self, watermark: Watermark) -> RollbackReport:
        """Resume from a checkpoint: undo what was trained, taken or dropped after it.

        Such groups return to SCORED if all their tokens' versions survive, else they are requested
        again under the same ordinal. Every lease is void. Requests beyond the admission bound are
        removed. Also right for an empty database (the run folder lost its buffer) and for one that
        is behind the checkpoint (power loss); the ledger then begins at the checkpoint. Without a
        checkpoint: Watermark(step=0, version=0, next_ordinal=0, refused=0).
        """

    def next_version(self) -> int:
        """Smallest version id never used, dead lineages included."""

    def steps_of(self, wanted: Collection[int]) -> dict[int, int]:
        """Step of each version: lag is a difference of steps, as version ids skip after a rollback."""

    def trained_ordinals(self) -> list[int]:
        """Ledger: ordinals trained in the surviving lineage, in training order."""

    def stats(self) -> BufferStats:
        """Counters for telemetry and `rlkit buffer`."""

    def close(self) -> None:
        """Release files and connections."""
