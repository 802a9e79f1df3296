"""The versioned buffer's contract: what learner and rollout workers may rely on.

Life of a group: REQUESTED -> LEASED -> GENERATED -> SCORED -> TAKEN -> TRAINED, or DROPPED(reason).

Terms
    ordinal      position of a group in the run's prompt order: 0, 1, 2, ... It never changes and is
                 never reused; the prompt of an ordinal is a pure function of (seed, ordinal).
    version      id of published weights. Strictly increasing over the life of the database, dead
                 lineages included, so that an id never means two things. Version 0 is the start.
    step         number of publishes in the surviving lineage: version 0 is step 0.
    admission    ordinal k may be requested only while k < (step + S + 1) * P + refused, with
                 S = max_staleness, P = prompts_per_step, refused = groups dropped so far. Groups are
                 taken in ordinal order, so k is trained at step <= admission step + S.
    min_version  the version at admission. An engine acknowledges it before it samples for k.
                 Together: lag of every trained token <= S.
    fencing      every lease has an epoch; a slice accepts writes from its newest lease only.
    commit       a checkpoint is the only commit point; what was trained after it is undone by
                 `rollback` when the run resumes from it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

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

    Example: a group of 16 samples with slice size 8 is two leases, (ordinal 7, 0, 8) and (7, 8, 16).
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Watermark:
    """What a checkpoint says of the buffer: everything trained before `step` is covered."""

    step: int
    version: int
    next_ordinal: int
    refused: int


@dataclass(frozen=True, slots=True, kw_only=True)
class RollbackReport:
    """What `rollback` did: ordinals that go on as scored, and ordinals to sample again."""

    restored: tuple[int, ...]
    requested_again: tuple[int, ...]
    dead_versions: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class BufferStats:
    """Groups by state, and counters since the database was made."""

    states: dict[str, int]
    dropped_reasons: dict[str, int]
    step: int
    version: int
    next_ordinal: int
    expired_leases: int
    fenced_writes: int


class VersionedBuffer(Protocol):
    """See the module docstring. Every verb is one transaction; all raise `BufferError` on misuse."""

    def capacity(self) -> int:
        """How many further ordinals may be requested now (>= 0)."""

    def request(self, requests: Sequence[GroupRequest]) -> None:
        """Admit groups; ordinals must continue at `next_ordinal` without a gap, within capacity."""

    def lease(self, worker_id: str, max_samples: int, timeout_s: float) -> list[Lease]:
        """Lease slices of the lowest ordinals, at most `max_samples` samples in all; [] if none.

        A slice is never larger than `slice_samples` of the buffer. Expired leases are reclaimed first.
        """

    def renew(self, leases: Sequence[Lease], timeout_s: float) -> list[Lease]:
        """Heartbeat: extend the deadline; a lost lease raises FencedError."""

    def submit(self, lease: Lease, rollouts: Sequence[Rollout]) -> None:
        """Store a slice's rollouts (GENERATED). FencedError if the lease is not the newest."""

    def score(self, lease: Lease, verdicts: Sequence[Verdict]) -> None:
        """Store a slice's verdicts; the group is SCORED once all its slices are."""

    def release(self, leases: Sequence[Lease]) -> None:
        """Give leases back unfinished; their slices are REQUESTED again."""

    def take(self, count: int) -> list[Group] | None:
        """The `count` lowest open ordinals as TAKEN, or None while any of them is not SCORED."""

    def drop(self, ordinals: Sequence[int], reason: str) -> None:
        """Refuse groups (DROPPED): each raises the admission bound by one."""

    def publish(self, version: int, trained: Sequence[int]) -> None:
        """TAKEN groups `trained` become TRAINED by the step that made `version`; step += 1."""

    def watermark(self) -> Watermark:
        """State to write into a checkpoint."""

    def commit(self, watermark: Watermark) -> None:
        """The checkpoint is on disk: payloads of groups it covers may be removed."""

    def rollback(self, watermark: Watermark) -> RollbackReport:
        """Resume from a checkpoint: undo what was trained, taken or dropped after it.

        Such groups return to SCORED if all their tokens' versions survive, else they are requested
        again under the same ordinal. Every lease is void. Requests beyond the admission bound are
        removed. Also right for an empty database (the run folder lost its buffer).
        """

    def next_version(self) -> int:
        """Smallest version id never used, dead lineages included."""

    def trained_ordinals(self) -> list[int]:
        """Ledger: ordinals trained in the surviving lineage, in training order."""

    def stats(self) -> BufferStats:
        """Counters for telemetry and `rlkit buffer`."""

    def close(self) -> None:
        """Release files and connections."""
