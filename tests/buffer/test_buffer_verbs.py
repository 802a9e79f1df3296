"""Each verb: what it does, and that it refuses misuse without changing anything."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from buffer_work import (
    Buffer,
    Clock,
    finish,
    open_at,
    prompt,
    request,
    rollout,
    rollouts,
    same,
    sample_all,
    train,
    verdicts,
)

from rlkit.buffer.protocol import FencedError, GroupRequest
from rlkit.errors import BufferError
from rlkit.types import Verdict

pytestmark = pytest.mark.usefixtures("database")


def test_sql_buffer_is_the_protocol(tmp_path: Path) -> None:
    buffer: Buffer = Buffer(
        f"sqlite:///{tmp_path / 'b.db'}",
        payload_dir=tmp_path / "payloads",
        prompts_per_step=3,
        max_staleness=2,
        slice_samples=1,
    )
    assert buffer.capacity() == 9
    buffer.close()
    buffer.close()


@pytest.mark.parametrize("wrong", [{"prompts": 0}, {"prompts": True}, {"staleness": -1}, {"slice_samples": 0}])
def test_settings_out_of_range(tmp_path: Path, clock: Clock, wrong: dict[str, int]) -> None:
    with pytest.raises(BufferError, match="out of range"):
        open_at(tmp_path, clock, **wrong)


def test_a_group_travels_whole(buffer: Buffer) -> None:
    request(buffer, 4, samples=5)
    leases = buffer.lease("a", 100, 60.0)
    assert [(x.ordinal, x.start, x.stop) for x in leases[:4]] == [(0, 0, 2), (0, 2, 4), (0, 4, 5), (1, 0, 2)]
    assert buffer.stats().states["leased"] == 4
    for lease in leases:
        buffer.submit(lease, list(reversed(rollouts(lease))))
    assert buffer.stats().states["generated"] == 4
    for lease in leases:
        buffer.score(lease, verdicts(lease))
    first, second = buffer.take(2) or []
    assert (first.ordinal, second.ordinal, first.samples) == (0, 1, 5)
    assert [r.index for r in first.rollouts] == [0, 1, 2, 3, 4]
    sent = {(r.ordinal, r.index): r for x in leases for r in rollouts(x)}
    assert all(same(r, sent[r.ordinal, r.index]) for g in (first, second) for r in g.rollouts)
    assert [v.score for v in second.verdicts] == [0.0, 1.0, 2.0, 3.0, 4.0]
    assert first.prompt.text == prompt(0).text
    assert np.array_equal(second.prompt.token_ids, prompt(1).token_ids)
    buffer.publish(1, [1, 0])
    assert buffer.trained_ordinals() == [0, 1]
    assert buffer.stats().states["trained"] == 2
    assert (buffer.stats().step, buffer.stats().version, buffer.next_version()) == (1, 1, 2)


def test_staleness_is_reached_and_not_passed(tmp_path: Path, clock: Clock) -> None:
    buffer = open_at(tmp_path, clock, prompts=2, staleness=2)
    lags = []
    for step in range(7):
        request(buffer, buffer.capacity())
        sample_all(buffer)
        groups = train(buffer)
        lags += [step - int(r.versions().min()) for g in groups for r in g.rollouts]
    buffer.close()
    assert max(lags) == 2 and lags[-8:] == [2] * 8


@pytest.mark.parametrize("ordinals", [[1], [0, 2], [0, 0], [1, 0]])
def test_request_refuses_gaps(buffer: Buffer, ordinals: list[int]) -> None:
    with pytest.raises(BufferError, match="without a gap"):
        buffer.request([GroupRequest(ordinal=k, prompt=prompt(k), samples=1) for k in ordinals])
    assert buffer.stats().next_ordinal == 0


def test_request_refuses_more_than_capacity_and_no_samples(buffer: Buffer) -> None:
    buffer.request([])
    with pytest.raises(BufferError, match="at most capacity\\(\\) = 4"):
        request(buffer, 5)
    with pytest.raises(BufferError, match="samples"):
        request(buffer, 1, samples=0)
    request(buffer, 4)
    with pytest.raises(BufferError, match="staleness bound"):
        request(buffer, 1)
    assert buffer.capacity() == 0


def test_request_refuses_metadata_it_cannot_store(buffer: Buffer) -> None:
    for value in (object(), 2**70, "\ud800"):
        bad = replace(prompt(0), metadata={"when": value})
        with pytest.raises(BufferError, match="metadata of prompt p0"):
            buffer.request([GroupRequest(ordinal=0, prompt=bad, samples=1)])


def test_lease_limits(buffer: Buffer, clock: Clock) -> None:
    assert buffer.lease("a", 8, 60.0) == []
    for most, timeout in ((0, 60.0), (1, 0.0), (1, math.inf), (1, math.nan)):
        with pytest.raises(BufferError, match="out of range"):
            buffer.lease("a", most, timeout)
    request(buffer, 2, samples=4)
    (small,) = buffer.lease("a", 1, 60.0)
    assert (small.ordinal, small.start, small.stop) == (0, 0, 1)  # the slice of 2 was split
    rest = buffer.lease("b", 100, 60.0)
    places = [(x.ordinal, x.start, x.stop) for x in rest]
    assert places == [(0, 1, 2), (0, 2, 4), (1, 0, 2), (1, 2, 4)]
    assert {x.deadline for x in rest} == {clock.now + 60.0}
    assert buffer.lease("c", 100, 60.0) == []
    finish(buffer, [small, *rest])
    assert [g.ordinal for g in buffer.take(2) or []] == [0, 1]


def test_expired_leases_are_leased_again_and_fenced(buffer: Buffer, clock: Clock) -> None:
    request(buffer, 1, samples=4)
    old = buffer.lease("a", 4, 10.0)
    buffer.submit(old[1], rollouts(old[1]))  # a worker that dies between sampling and scoring
    clock.now += 9.9
    assert buffer.lease("b", 4, 10.0) == []
    clock.now += 0.1
    new = buffer.lease("b", 4, 10.0)
    assert [(x.start, x.epoch) for x in new] == [(0, 2), (2, 2)]
    assert buffer.stats().expired_leases == 2
    for fenced in (
        lambda: buffer.submit(old[0], rollouts(old[0])),
        lambda: buffer.score(old[1], verdicts(old[1])),
        lambda: buffer.renew(old, 10.0),
    ):
        with pytest.raises(FencedError, match="another worker may hold"):
            fenced()
    assert buffer.stats().fenced_writes == 4
    buffer.release(old)
    finish(buffer, new)
    (group,) = buffer.take(1) or []
    assert all(same(r, rollouts(new[r.index // 2])[r.index % 2]) for r in group.rollouts)


def test_a_late_worker_keeps_a_lease_nobody_reclaimed(buffer: Buffer, clock: Clock) -> None:
    request(buffer, 1, samples=2)
    (lease,) = buffer.lease("a", 2, 10.0)
    clock.now += 11.0
    (lease,) = buffer.renew([lease], 10.0)
    assert lease.deadline == clock.now + 10.0
    assert buffer.lease("b", 2, 10.0) == []
    assert buffer.renew([], 10.0) == []
    finish(buffer, [lease])
    assert buffer.renew([lease], 10.0)  # a heartbeat that comes after the last verdict
    buffer.release([lease])  # what is scored stays
    assert buffer.stats().states["scored"] == 1


def test_one_lost_lease_does_not_cost_the_others(buffer: Buffer, clock: Clock) -> None:
    request(buffer, 1, samples=4)
    lost, kept = buffer.lease("a", 4, 10.0)
    buffer.release([lost])
    clock.now += 5.0
    with pytest.raises(FencedError) as caught:
        buffer.renew([lost, kept], 10.0)
    assert caught.value.lost == (lost,)
    clock.now += 6.0  # past the first deadline of `kept`, not past the renewed one
    (other,) = buffer.lease("b", 4, 10.0)
    assert (other.start, buffer.stats().expired_leases) == (lost.start, 0)
    with pytest.raises(FencedError):
        buffer.submit_many([(lost, rollouts(lost)), (kept, rollouts(kept))])
    with pytest.raises(FencedError):
        buffer.score_many([(lost, verdicts(lost)), (kept, verdicts(kept))])
    finish(buffer, [other])
    assert buffer.take(1) is not None


def test_a_lease_of_another_database_is_fenced(buffer: Buffer, tmp_path: Path) -> None:
    elsewhere = open_at(tmp_path / "other", Clock())
    for x in (buffer, elsewhere):
        request(x, 2, samples=4)
    buffer.lease("a", 2, 60.0)
    foreign = elsewhere.lease("a", 8, 60.0)
    own = buffer.lease("a", 8, 60.0)
    elsewhere.close()
    assert foreign[3].lease_id in {x.lease_id for x in own}
    with pytest.raises(FencedError):
        buffer.submit(replace(foreign[3], start=0, stop=2), rollouts(replace(foreign[3], start=0, stop=2)))


def test_submit_refuses_what_is_not_the_lease(buffer: Buffer) -> None:
    request(buffer, 1, samples=2)
    (lease,) = buffer.lease("a", 2, 60.0)
    good = rollouts(lease)
    short = replace(good[1], loss_mask=good[1].loss_mask[:1])
    wide = replace(good[1], token_ids=good[1].token_ids.astype(np.int32))
    uncovered = replace(good[1], version_spans=good[1].version_spans * 2)
    for work, message in (
        (good[:1], "not those of the lease"),
        ([*good, good[0]], "not those of the lease"),
        ([good[0], rollout(1, 1, [0])], "not those of the lease"),
        ([good[0], rollout(0, 1, [7])], "wrong weights"),
        ([good[0], short], "loss_mask has the wrong type or length"),
        ([good[0], wide], "token_ids has the wrong type"),
        ([good[0], uncovered], "do not cover"),
    ):
        with pytest.raises(BufferError, match=message):
            buffer.submit(lease, work)
    with pytest.raises(BufferError, match="named twice"):
        buffer.submit_many([(lease, good), (lease, good)])
    with pytest.raises(BufferError, match="cannot be scored"):
        buffer.score(lease, verdicts(lease))
    assert buffer.stats().states["leased"] == 1
    buffer.submit(lease, good)
    with pytest.raises(BufferError, match="cannot be submitted"):
        buffer.submit(lease, good)


def test_submit_refuses_tokens_older_than_the_admission(buffer: Buffer) -> None:
    request(buffer, 4, samples=2)
    sample_all(buffer)
    train(buffer)
    request(buffer, 1, samples=2)
    (lease,) = buffer.lease("a", 2, 60.0)
    assert lease.min_version == 1
    for versions in ([0], [0, 1]):
        with pytest.raises(BufferError, match=re.escape("surviving versions from 1 on")):
            buffer.submit(lease, rollouts(lease, versions))
    buffer.submit(lease, rollouts(lease))


def test_score_refuses_what_is_no_verdict(buffer: Buffer) -> None:
    request(buffer, 1, samples=2)
    (lease,) = buffer.lease("a", 2, 60.0)
    buffer.submit(lease, rollouts(lease))
    for wrong in ([], verdicts(lease)[:1], verdicts(lease) * 2):
        with pytest.raises(BufferError, match="not those of the lease"):
            buffer.score(lease, wrong)
    for value in (math.nan, math.inf):
        with pytest.raises(BufferError, match="finite number or None"):
            buffer.score(lease, [Verdict(score=value), Verdict(score=1.0)])
    failed = Verdict(score=None, parts={"math": None}, reason="timeout")
    buffer.score(lease, [failed, Verdict(score=1.0, parts={"math": 1.0}, answer="4")])
    with pytest.raises(BufferError, match="cannot be scored"):
        buffer.score(lease, verdicts(lease))
    (group,) = buffer.take(1) or []
    assert group.verdicts[0] == failed


def test_release_gives_back(buffer: Buffer) -> None:
    request(buffer, 1, samples=4)
    leases = buffer.lease("a", 4, 60.0)
    buffer.submit(leases[0], rollouts(leases[0]))
    buffer.release(leases)
    assert buffer.stats().states["requested"] == 1
    assert [x.epoch for x in buffer.lease("b", 4, 60.0)] == [2, 2]


def test_take_waits_for_the_lowest(buffer: Buffer) -> None:
    request(buffer, 3, samples=2)
    leases = buffer.lease("a", 6, 60.0)
    buffer.release(leases[:1])
    finish(buffer, leases[1:])
    assert buffer.take(1) is None and buffer.take(2) is None
    (lowest,) = buffer.lease("a", 6, 60.0)
    assert buffer.take(1) is None
    buffer.submit(lowest, rollouts(lowest))
    assert buffer.take(1) is None
    buffer.score(lowest, verdicts(lowest))
    assert buffer.take(4) is None
    assert [g.ordinal for g in buffer.take(2) or []] == [0, 1]
    assert [g.ordinal for g in buffer.take(1) or []] == [2]
    assert buffer.take(1) is None
    with pytest.raises(BufferError, match="count"):
        buffer.take(0)


def test_drop_raises_the_bound_and_voids_leases(buffer: Buffer) -> None:
    request(buffer, 4, samples=2)
    leases = buffer.lease("a", 8, 60.0)
    finish(buffer, leases[:2])
    assert buffer.take(1) is not None
    buffer.drop([0, 2], "no signal")
    assert buffer.capacity() == 2
    assert buffer.stats().dropped_reasons == {"no signal": 2}
    with pytest.raises(FencedError):
        buffer.submit(leases[2], rollouts(leases[2]))
    assert buffer.lease("b", 8, 60.0) == []
    finish(buffer, leases[3:])
    buffer.drop([], "nothing")
    for ordinals, message in (([0], "dropped"), ([9], "never requested"), ([1, 1], "named twice")):
        with pytest.raises(BufferError, match=message):
            buffer.drop(ordinals, "again")
    with pytest.raises(BufferError, match="needs a reason"):
        buffer.drop([1], "")
    assert [g.ordinal for g in train(buffer)] == [1, 3]
    with pytest.raises(BufferError, match="trained"):
        buffer.drop([1], "too late")


def test_publish_is_strict(buffer: Buffer) -> None:
    request(buffer, 4, samples=2)
    sample_all(buffer)
    buffer.take(2)
    for version, trained, message in (
        (0, [0, 1], ">= 1"),
        (1, [0], "every taken group"),
        (1, [], "every taken group"),
        (1, [0, 0], "named twice"),
        (1, [0, 2], "cannot be trained now"),
        (1, [0, 9], "never requested"),
    ):
        with pytest.raises(BufferError, match=message):
            buffer.publish(version, trained)
    buffer.take(1)
    with pytest.raises(BufferError, match="every taken group"):
        buffer.publish(1, [0, 1, 2])  # more than P
    with pytest.raises(BufferError, match=re.escape("taken besides: [2]")):
        buffer.publish(1, [0, 1])
    buffer.drop([1], "no signal")
    buffer.publish(5, [0, 2])
    assert (buffer.stats().version, buffer.stats().step, buffer.next_version()) == (5, 1, 6)
    with pytest.raises(BufferError, match=">= 6"):
        buffer.publish(5, [])


def test_counts_of_samples_may_differ(buffer: Buffer) -> None:
    buffer.request([GroupRequest(ordinal=k, prompt=prompt(k), samples=n) for k, n in enumerate((1, 7))])
    sample_all(buffer)
    assert [len(g.rollouts) for g in buffer.take(2) or []] == [1, 7]


def test_batches_equal_single_calls(tmp_path: Path) -> None:
    taken = []
    for many in (False, True):
        buffer = open_at(tmp_path / str(many), Clock())
        request(buffer, 4)
        leases = buffer.lease("a", 16, 60.0)
        if many:
            buffer.submit_many([(x, rollouts(x)) for x in leases])
            buffer.score_many([(x, verdicts(x)) for x in leases])
        else:
            finish(buffer, leases)
        taken.append(buffer.take(4) or [])
        buffer.close()
    one, other = taken
    assert all(a.verdicts == b.verdicts for a, b in zip(one, other, strict=True))
    pairs = [(x, y) for a, b in zip(one, other, strict=True) for x, y in zip(a.rollouts, b.rollouts, strict=True)]
    assert len(pairs) == 16 and all(same(x, y) for x, y in pairs)
