"""Random interleavings of workers, lagging engines, learner, checkpoints, crashes and zombies against a model.

RLKIT_INTERLEAVINGS=2000 pytest -s --timeout=0 --hypothesis-seed=1: so many on each database; prints what happened.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections import Counter
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
sampling = st.sampled_from(("oldest", "newest", "mixed", "engine"))
pick = st.randoms(use_true_random=False)
workers = st.sampled_from("abc")
COUNT = int(os.environ.get("RLKIT_INTERLEAVINGS", "0"))


@dataclass
class Checkpoint:
    watermark: Watermark
    ledger: list[int]
    versions: dict[int, int]


class BufferMachine(RuleBasedStateMachine):
    """`leases`: what is valid, by lease_id; `zombies`: what was, and is not any more; `engines`: versions of workers'.

    `lags`: of groups that were trained, their oldest token's, counted by (S, lag).
    """

    lags: Counter[tuple[int, int]] = Counter()
    happened: Counter[str] = Counter()

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
        self.oldest: dict[int, int] = {}  # oldest version of taken groups
        self.engines = dict.fromkeys("abcd", 0)
        self.samples: dict[int, int] = {}
        self.next_ordinal = 0
        self.fenced = self.expired = self.largest = 0
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
        self.samples |= dict.fromkeys(range(self.next_ordinal, self.next_ordinal + count), samples)
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
            self.oldest[group.ordinal] = min(int(v) for r in group.rollouts for v in r.versions())
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
        for ordinal in self.taken:  # its oldest token's
            lag = self.step - self.versions[self.oldest[ordinal]]
            assert 0 <= lag <= self.staleness
            self.largest = max(self.largest, lag)
            self.lags[self.staleness, lag] += 1
        self.versions[version] = self.step + 1
        self.used.add(version)
        self.ledger += sorted(self.taken)
        self.taken = []

    @rule(steps=st.integers(1, 3), eager=st.booleans(), spans=sampling, ahead=st.booleans())
    def train(self, steps: int, eager: bool, spans: str, ahead: bool) -> None:
        """Some whole steps: single rules alone seldom get far into a run.

        Without `ahead` only what these steps need is sampled: the rest waits, or is in work, while versions go by.
        """
        for _ in range(steps):
            waiting = self.next_ordinal - len(self.ledger) - len(self.dropped)
            needed = max(0, self.prompts - waiting)
            self.request_groups(self.buffer.capacity() if eager else needed, 2)
            ended = {*self.ledger, *self.dropped, *self.taken}
            wanted = [k for k in range(self.next_ordinal) if k not in ended][: self.prompts - len(self.taken)]
            self.work(spans, None if ahead else max(wanted, default=-1))
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
        self.happened["drop"] += 1
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
        self.happened["lost buffer" if lost else "crash"] += 1
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

    @rule(worker=workers, random=pick)
    def load(self, worker: str, random) -> None:
        """An engine gets weights, not always the newest; till then it lags, or has a dead version's after a crash."""
        self.engines[worker] = random.choice(sorted(self.versions))

    @rule(worker=workers, most=st.sampled_from((1, 2, 3, 4, 12)), pinned=st.booleans(), ask=st.booleans())
    def lease(self, worker: str, most: int, pinned: bool, ask: bool) -> None:
        """`pinned`: only what the worker's engine may sample as it is; `ask`: the learner has just asked for more."""
        if ask:
            self.request_groups(self.buffer.capacity(), 4)
        self.lease_some(worker, most, pinned)

    def lease_some(self, worker: str, most: int, pinned: bool) -> list[Lease]:
        late = [k for k, x in self.leases.items() if x.deadline <= self.clock.now]
        self.expired += len(late)
        self.happened["expiry"] += len(late)
        self.forget(late)
        engine = self.engines[worker]
        leases = self.buffer.lease(worker, most, TIMEOUT, version=engine if pinned else None)
        assert [(x.ordinal, x.start) for x in leases] == sorted((x.ordinal, x.start) for x in leases)
        self.happened["pinned lease"] += pinned and bool(leases)
        assert sum(x.stop - x.start for x in leases) <= most
        for x in leases:
            assert x.stop - x.start <= self.slice_samples
            assert not pinned or x.min_version <= engine
            self.happened["split slice"] += x.stop % self.slice_samples != 0 and x.stop != self.samples[x.ordinal]
            assert x.prompt.id == prompt(x.ordinal).id
            busy = [y for y in self.leases.values() if y.ordinal == x.ordinal]
            assert all(x.stop <= y.start or y.stop <= x.start for y in busy)
            self.leases[x.lease_id] = x
            self.submitted.discard(x.lease_id)
        return leases

    @precondition(lambda self: self.leases)
    @rule(random=pick, spans=sampling)
    def submit(self, random, spans: str) -> None:
        lease = random.choice([*self.leases.values()])
        if lease.lease_id in self.submitted:
            with pytest.raises(BufferError, match="cannot be submitted"):
                self.buffer.submit(lease, rollouts(lease))
        else:
            self.sample(lease, spans)

    @precondition(lambda self: self.leases.keys() - self.submitted)
    @rule(random=pick)
    def submit_from_engine(self, random) -> None:
        """With the weights it has: of a live version from min_version on, however far behind; else refused."""
        lease = self.leases[random.choice(sorted(self.leases.keys() - self.submitted))]
        version = self.engines[lease.worker_id]
        if version in self.versions and version >= lease.min_version:
            self.sample(lease, "engine")
        else:
            self.happened["old weights" if version in self.versions else "dead weights"] += 1
            with pytest.raises(BufferError, match="wrong weights"):
                self.buffer.submit(lease, rollouts(lease, [version]))

    def sample(self, lease: Lease, spans: str) -> None:
        allowed = [v for v in sorted(self.versions) if v >= lease.min_version]
        engine = self.engines[lease.worker_id]
        if spans == "engine" and engine not in allowed:  # brought to min_version, no further
            self.engines[lease.worker_id] = engine = allowed[0]
        chosen = {"oldest": allowed[:1], "newest": allowed[-1:], "mixed": allowed, "engine": [engine]}[spans]
        self.happened["lagging tokens"] += chosen[0] < allowed[-1]
        self.happened["several versions"] += len(chosen) > 1
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
    def work(self, spans: str, last: int | None = None) -> None:
        """A worker finishes everything it and the others have begun, and all that waits; or up to one ordinal."""
        leases = [*self.leases.values()]
        while True:
            for lease in leases:
                if last is None or lease.ordinal <= last:
                    self.finish(lease, spans)
            leases = self.lease_some("d", 64 if last is None else 4, pinned=False)
            if not leases or (last is not None and leases[0].ordinal > last):
                break

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
        self.happened["zombie"] += 1
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
            self.happened["interleavings"] += 1
            self.clock.now += TIMEOUT
            self.expired += len(self.leases)
            self.leases.clear()
            self.largest = 0
            self.train(self.staleness + 2, True, "oldest", ahead=True)
            assert self.largest == self.staleness  # the bound is reached
            ended = set(self.ledger) | self.dropped
            assert set(range(max(self.ledger) + 1)) <= ended
            assert self.buffer.trained_ordinals() == self.ledger[self.ledger_start :]
            self.buffer.close()
        shutil.rmtree(self.folder)


class TestBufferMachine(BufferMachine.TestCase):  # type: ignore[name-defined, misc]
    settings = settings(
        max_examples=COUNT or 40, stateful_step_count=40, deadline=None, suppress_health_check=list(HealthCheck)
    )

    def tearDown(self) -> None:
        super().tearDown()
        for staleness in range(3):
            found = {lag: n for (s, lag), n in sorted(BufferMachine.lags.items()) if s == staleness}
            print(f"\nmax_staleness {staleness}: trained groups by lag of their oldest token: {found}", end="")
        print("\n" + ", ".join(f"{what}: {n}" for what, n in sorted(BufferMachine.happened.items())))
        BufferMachine.lags.clear()
        BufferMachine.happened.clear()


@pytest.mark.usefixtures("postgresql")
class TestBufferMachineOnPostgresql(TestBufferMachine):
    settings = settings(TestBufferMachine.settings, max_examples=COUNT or 8)
