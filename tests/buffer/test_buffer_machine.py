"""Random interleavings of workers, learner, checkpoints, crashes and zombies against a model."""

from __future__ import annotations

import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

import pytest
from buffer_work import START, Clock, open_at, prompt, request, rollouts, same, verdicts
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from rlkit.buffer.protocol import FencedError, Lease, Watermark
from rlkit.errors import BufferError
from rlkit.types import Rollout

TIMEOUT = 10.0
sampling = st.sampled_from(("oldest", "newest", "mixed"))
pick = st.randoms(use_true_random=False)


@dataclass
class Checkpoint:
    watermark: Watermark
    ledger: list[int]
    versions: dict[int, int]


class BufferMachine(RuleBasedStateMachine):
    """`leases`: what is valid, by lease_id; `zombies`: what was, and is not any more."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp(prefix="rlkit-buffer-"))
        self.clock = Clock()
        self.leases: dict[int, Lease] = {}
        self.submitted: set[int] = set()
        self.zombies: list[Lease] = []
        self.stored: dict[tuple[int, int], Rollout] = {}
        self.versions = {0: 0}
        self.used = {0}
        self.ledger: list[int] = []
        self.dropped: set[int] = set()
        self.taken: list[int] = []
        self.next_ordinal = 0
        self.fenced = self.expired = 0
        self.checkpoints = [Checkpoint(START, [], {0: 0})]
        self.ledger_start = 0

    @initialize(prompts=st.integers(1, 3), staleness=st.integers(0, 2), slice_samples=st.integers(1, 3))
    def open(self, prompts: int, staleness: int, slice_samples: int) -> None:
        self.prompts, self.staleness, self.slice_samples = prompts, staleness, slice_samples
        self.reopen()

    def reopen(self) -> None:
        self.buffer = open_at(
            self.folder, self.clock, prompts=self.prompts, staleness=self.staleness, slice_samples=self.slice_samples
        )

    @property
    def step(self) -> int:
        return max(self.versions.values())

    def bound(self) -> int:
        return (self.step + self.staleness + 1) * self.prompts + len(self.dropped)

    # ---- learner

    @rule(share=st.floats(0.3, 1), samples=st.integers(1, 5))
    def request(self, share: float, samples: int) -> None:
        count = -int(-share * self.buffer.capacity() // 1)
        self.request_groups(count, samples)

    def request_groups(self, count: int, samples: int) -> None:
        request(self.buffer, count, samples)
        # an ordinal that a rollback removed may come back with fewer samples
        self.stored = {k: r for k, r in self.stored.items() if k[0] < self.next_ordinal}
        self.next_ordinal += count

    @rule()
    def refuses_too_many(self) -> None:
        with pytest.raises(BufferError, match="staleness bound"):
            request(self.buffer, self.buffer.capacity() + 1)

    @rule()
    def take(self) -> None:
        wanted = self.prompts - len(self.taken)
        if wanted == 0:
            return
        groups = self.buffer.take(wanted)
        if groups is None:
            return
        for group in groups:
            assert group.prompt.id == f"p{group.ordinal}"
            assert [v.answer for v in group.verdicts] == [str(i) for i in range(group.samples)]
            for index, found in enumerate(group.rollouts):
                assert same(found, self.stored[group.ordinal, index])
                for version in found.versions():
                    lag = self.step - self.versions[int(version)]  # KeyError: a dead version
                    assert 0 <= lag <= self.staleness
        ordinals = [group.ordinal for group in groups]
        ended = {*self.ledger, *self.dropped, *self.taken}
        unended = [k for k in range(self.next_ordinal) if k not in ended]
        assert ordinals == unended[:wanted]
        self.taken += ordinals

    @precondition(lambda self: len(self.taken) == self.prompts)
    @rule(gap=st.integers(0, 2))
    def publish(self, gap: int) -> None:
        version = self.buffer.next_version() + gap
        assert version not in self.used
        self.buffer.publish(version, self.taken)
        self.versions[version] = self.step + 1
        self.used.add(version)
        self.ledger += sorted(self.taken)
        self.taken = []

    @rule(steps=st.integers(1, 3), eager=st.booleans(), spans=sampling)
    def train(self, steps: int, eager: bool, spans: str) -> None:
        """Some whole steps: single rules alone seldom get far into a run."""
        for _ in range(steps):
            waiting = self.next_ordinal - len(self.ledger) - len(self.dropped)
            needed = max(0, self.prompts - waiting)
            self.request_groups(self.buffer.capacity() if eager else needed, 2)
            self.work(spans)
            self.take()
            self.publish(0)

    @rule(random=pick)
    def drop(self, random) -> None:
        ended = {*self.ledger, *self.dropped}
        candidates = [k for k in range(self.next_ordinal) if k not in ended]
        if not candidates:
            return
        ordinal = random.choice(random.choice([self.taken, []]) or candidates)
        self.buffer.drop([ordinal], "tired of it")
        self.dropped.add(ordinal)
        self.taken = [k for k in self.taken if k != ordinal]
        self.forget(k for k, x in self.leases.items() if x.ordinal == ordinal)

    @rule(commit=st.booleans())
    def checkpoint(self, commit: bool) -> None:
        watermark = self.buffer.watermark()
        assert watermark.step == self.step
        covered = {k for k in range(watermark.next_ordinal)}
        assert covered == set(self.ledger) | {k for k in self.dropped if k in covered}
        assert watermark.refused == len(self.dropped & covered)
        self.checkpoints.append(Checkpoint(watermark, list(self.ledger), dict(self.versions)))
        if commit:
            self.buffer.commit(watermark)

    @rule(back=st.integers(1, 2), lose_buffer=st.integers(0, 5))
    def crash(self, back: int, lose_buffer: int) -> None:
        """The process dies; the run resumes from its newest checkpoint, or the one before."""
        self.buffer.close()
        kept = len(self.checkpoints) - min(back, len(self.checkpoints)) + 1
        self.checkpoints = self.checkpoints[:kept]  # those after it are of a dead lineage
        chosen = self.checkpoints[-1]
        lost = lose_buffer == 0
        if lost:
            shutil.rmtree(self.folder)
            self.folder = Path(tempfile.mkdtemp(prefix="rlkit-buffer-"))
        self.reopen()
        report = self.buffer.rollback(chosen.watermark)
        first = chosen.watermark.next_ordinal
        dead = set(self.versions) - set(chosen.versions)
        if lost:
            # what the lost database knew of versions went with it: an id means one thing in one
            self.used = set(chosen.versions)
            self.zombies, self.leases, self.fenced, self.expired = [], {}, 0, 0
            self.submitted.clear()  # lease ids begin anew
            self.checkpoints = [chosen]
            self.ledger_start = len(chosen.ledger)
            assert report.restored == report.requested_again == ()
        else:
            assert set(report.dead_versions) == dead
        self.ledger = list(chosen.ledger)
        self.versions = dict(chosen.versions)
        self.dropped = set(range(first)) - set(self.ledger)
        self.taken = []
        self.forget(self.leases)
        self.next_ordinal = self.buffer.stats().next_ordinal
        kept = sorted((*report.restored, *report.requested_again))
        assert kept == list(range(first, self.next_ordinal))
        assert self.next_ordinal <= max(first, self.bound())
        for ordinal in report.restored:  # what goes on as scored keeps the bound as it is now
            found = [r for (k, _), r in self.stored.items() if k == ordinal]
            oldest = min(self.versions[int(v)] for r in found for v in r.versions())
            window = (oldest + self.staleness + 1) * self.prompts
            assert ordinal < window + len(self.dropped)

    # ---- workers

    @rule(worker=st.sampled_from("abc"), most=st.integers(1, 12))
    def lease(self, worker: str, most: int) -> None:
        late = [k for k, x in self.leases.items() if x.deadline <= self.clock.now]
        self.expired += len(late)
        self.forget(late)
        leases = self.buffer.lease(worker, most, TIMEOUT)
        assert sum(x.stop - x.start for x in leases) <= most
        for x in leases:
            assert x.stop - x.start <= self.slice_samples
            assert x.prompt.id == prompt(x.ordinal).id
            busy = [y for y in self.leases.values() if y.ordinal == x.ordinal]
            assert all(x.stop <= y.start or y.stop <= x.start for y in busy)
            self.leases[x.lease_id] = x
            self.submitted.discard(x.lease_id)

    @precondition(lambda self: self.leases)
    @rule(random=pick, spans=sampling)
    def submit(self, random, spans: str) -> None:
        lease = random.choice([*self.leases.values()])
        if lease.lease_id in self.submitted:
            with pytest.raises(BufferError, match="cannot be submitted"):
                self.buffer.submit(lease, rollouts(lease))
        else:
            self.sample(lease, spans)

    def sample(self, lease: Lease, spans: str) -> None:
        allowed = [v for v in sorted(self.versions) if v >= lease.min_version]
        chosen = {"oldest": allowed[:1], "newest": allowed[-1:], "mixed": allowed}[spans]
        work = rollouts(lease, chosen)
        self.buffer.submit(lease, work)
        self.submitted.add(lease.lease_id)
        self.stored |= {(r.ordinal, r.index): r for r in work}

    @precondition(lambda self: self.leases.keys() & self.submitted)
    @rule(random=pick)
    def score(self, random) -> None:
        lease = self.leases[random.choice(sorted(self.leases.keys() & self.submitted))]
        self.buffer.score(lease, verdicts(lease))
        del self.leases[lease.lease_id]

    @precondition(lambda self: self.leases)
    @rule(random=pick, spans=sampling)
    def finish_one(self, random, spans: str) -> None:
        self.finish(self.leases[random.choice(sorted(self.leases))], spans)

    @rule(spans=sampling)
    def work(self, spans: str) -> None:
        """A worker finishes everything it and the others have begun, and all that waits."""
        for lease in [*self.leases.values()]:
            self.finish(lease, spans)
        while leases := self.buffer.lease("d", 64, TIMEOUT):
            for lease in leases:
                self.leases[lease.lease_id] = lease
                self.finish(lease, spans)

    def finish(self, lease: Lease, spans: str) -> None:
        if lease.lease_id not in self.submitted:
            self.sample(lease, spans)
        self.buffer.score(lease, verdicts(lease))
        del self.leases[lease.lease_id]

    @precondition(lambda self: self.leases)
    @rule(random=pick)
    def renew(self, random) -> None:
        lease = random.choice([*self.leases.values()])
        (renewed,) = self.buffer.renew([lease], TIMEOUT)
        assert renewed.deadline == self.clock.now + TIMEOUT
        self.leases[lease.lease_id] = renewed

    @precondition(lambda self: self.leases)
    @rule(random=pick)
    def release(self, random) -> None:
        lease = random.choice([*self.leases.values()])
        self.buffer.release([lease])
        self.forget([lease.lease_id])

    @precondition(lambda self: self.zombies)
    @rule(random=pick, verb=st.sampled_from(("submit", "score", "renew")))
    def zombie(self, random, verb: str) -> None:
        lease = random.choice(self.zombies)
        before = self.buffer.stats().states
        with pytest.raises(FencedError) as caught:
            if verb == "submit":
                self.buffer.submit(lease, rollouts(lease))
            elif verb == "score":
                self.buffer.score(lease, verdicts(lease))
            else:
                self.buffer.renew([lease], TIMEOUT)
        assert caught.value.lost == (lease,)
        self.fenced += 1
        self.buffer.release([lease])  # passed over
        assert self.buffer.stats().states == before

    @rule(seconds=st.sampled_from((1.0, 4.0, TIMEOUT)))
    def wait(self, seconds: float) -> None:
        self.clock.now += seconds

    def forget(self, lease_ids) -> None:
        for lease_id in [*lease_ids]:
            self.zombies.append(self.leases.pop(lease_id))

    # ---- what always holds

    @invariant()
    def agrees(self) -> None:
        if not hasattr(self, "buffer"):
            return
        stats = self.buffer.stats()
        assert stats.next_ordinal == self.next_ordinal
        assert (stats.step, stats.version) == (self.step, max(self.versions))
        assert (stats.expired_leases, stats.fenced_writes) == (self.expired, self.fenced)
        assert self.bound() - self.next_ordinal == self.buffer.capacity() >= 0
        assert self.ledger == sorted(set(self.ledger))  # once each, in order
        assert self.buffer.next_version() > max(self.used)
        assert stats.states["taken"] == len(self.taken)

    def teardown(self) -> None:
        """Whatever happened, the run goes on, and no ordinal is lost."""
        if hasattr(self, "buffer"):
            self.clock.now += TIMEOUT
            self.expired += len(self.leases)
            self.leases.clear()
            self.train(self.staleness + 2, True, "oldest")
            ended = set(self.ledger) | self.dropped
            assert set(range(max(self.ledger) + 1)) <= ended
            assert self.buffer.trained_ordinals() == self.ledger[self.ledger_start :]
            self.buffer.close()
        shutil.rmtree(self.folder)


TestBufferMachine = BufferMachine.TestCase
TestBufferMachine.settings = settings(
    max_examples=40, stateful_step_count=40, deadline=None, suppress_health_check=list(HealthCheck)
)


@pytest.mark.usefixtures("postgresql")
class TestBufferMachineOnPostgresql(BufferMachine.TestCase):  # type: ignore[name-defined, misc]
    settings = settings(TestBufferMachine.settings, max_examples=8)
