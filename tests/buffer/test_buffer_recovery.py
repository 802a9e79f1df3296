"""Commit and rollback: what survives, what is sampled again, what is refused."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from buffer_work import START, Buffer, Clock, finish, open_at, request, rollouts, same, sample_all, train, verdicts

from rlkit.buffer.protocol import FencedError, Watermark
from rlkit.errors import BufferError

pytestmark = pytest.mark.usefixtures("database")


def fill(buffer: Buffer, samples: int = 2) -> None:
    request(buffer, buffer.capacity(), samples)
    sample_all(buffer)


def test_watermark_covers_what_is_below_its_ordinal(buffer: Buffer) -> None:
    assert buffer.watermark() == START
    fill(buffer)
    assert buffer.watermark() == START
    buffer.take(2)
    buffer.drop([0], "no signal")
    assert buffer.watermark() == Watermark(step=0, version=0, next_ordinal=1, refused=1)
    buffer.take(1)
    buffer.publish(1, [1, 2])
    assert buffer.watermark() == Watermark(step=1, version=1, next_ordinal=3, refused=1)


def test_a_learner_that_slept_does_nothing_once_another_one_leads(tmp_path: Path, clock: Clock) -> None:
    first, second = open_at(tmp_path, clock), open_at(tmp_path, clock)
    first.rollback(START)
    fill(first)
    groups = first.take(2)
    assert groups is not None
    second.rollback(START)  # on another host, where the first one's lock on the folder is not seen
    late = [
        lambda: first.publish(first.next_version(), [g.ordinal for g in groups]),
        lambda: first.drop([0], "late"),
        lambda: request(first, 1, 2),
        lambda: first.commit(first.watermark()),
        lambda: first.take(2),
    ]
    for verb in late:
        with pytest.raises(BufferError, match="another learner has gone on with this run"):
            verb()
    sample_all(first)  # workers serve whoever leads
    train(second)
    assert second.trained_ordinals() == [0, 1]


def test_rollback_undoes_training_after_the_checkpoint(tmp_path: Path, clock: Clock) -> None:
    buffer = open_at(tmp_path, clock)
    fill(buffer)
    train(buffer)
    mark = buffer.watermark()
    buffer.commit(mark)
    lost = train(buffer)  # ordinals 2 and 3, sampled under version 0
    request(buffer, 1, samples=2)
    (zombie,) = buffer.lease("a", 2, 60.0)
    buffer.close()

    buffer = open_at(tmp_path, clock)
    report = buffer.rollback(mark)
    assert (report.restored, report.requested_again) == ((2, 3), (4,))
    assert (report.dead_versions, report.corrupt, report.removed) == ((2,), (), ())
    assert buffer.trained_ordinals() == [0, 1]
    assert buffer.next_version() == 3
    with pytest.raises(FencedError):
        buffer.submit(zombie, rollouts(zombie))
    (lease,) = buffer.lease("a", 2, 60.0)
    assert (lease.ordinal, lease.min_version) == (4, 1)
    with pytest.raises(BufferError, match="wrong weights"):
        buffer.submit(lease, rollouts(lease, [2]))  # an engine still on the dead version
    again = train(buffer)
    pairs = [(x, y) for g, h in zip(lost, again, strict=True) for x, y in zip(g.rollouts, h.rollouts, strict=True)]
    assert len(pairs) == 4 and all(same(x, y) for x, y in pairs)
    assert buffer.watermark() == Watermark(step=2, version=3, next_ordinal=4, refused=0)
    assert buffer.rollback(buffer.watermark()).requested_again == (4,)
    buffer.close()


def test_groups_with_tokens_of_dead_versions_are_sampled_again(buffer: Buffer) -> None:
    request(buffer, 2, samples=2)
    sample_all(buffer)
    mark = buffer.watermark()
    train(buffer)
    request(buffer, 2, samples=4)
    for lease, versions in zip(buffer.lease("a", 8, 60.0), ([1], [1], [1], [1]), strict=True):
        buffer.submit(lease, rollouts(lease, versions))
        buffer.score(lease, verdicts(lease))
    report = buffer.rollback(mark)
    assert (report.restored, report.requested_again) == ((0, 1), (2, 3))
    assert {x.min_version for x in buffer.lease("a", 8, 60.0)} == {0}


def test_one_token_of_a_dead_version_is_enough(buffer: Buffer) -> None:
    request(buffer, 4, samples=2)
    first = buffer.lease("a", 4, 60.0)
    finish(buffer, first)
    mark = buffer.watermark()
    train(buffer)
    pure, mixed = buffer.lease("a", 4, 60.0)
    buffer.submit_many([(pure, rollouts(pure, [0])), (mixed, rollouts(mixed, [0, 1]))])
    buffer.score_many([(x, verdicts(x)) for x in (pure, mixed)])
    assert buffer.rollback(mark).requested_again == (mixed.ordinal,)


def test_half_scored_groups_are_sampled_again(buffer: Buffer) -> None:
    request(buffer, 1, samples=6)
    one, two, _ = buffer.lease("a", 6, 60.0)
    finish(buffer, [one])
    buffer.submit(two, rollouts(two))
    assert buffer.rollback(START).requested_again == (0,)
    leases = buffer.lease("a", 6, 60.0)
    assert [x.start for x in leases] == [0, 2, 4]
    finish(buffer, leases)
    assert buffer.take(1) is not None


def test_drops_after_the_watermark_are_undone(buffer: Buffer) -> None:
    fill(buffer)
    buffer.take(2)
    buffer.drop([1], "no signal")  # scored: it comes back as it was
    fill(buffer)  # ordinal 4, admitted because 1 was refused
    assert buffer.stats().next_ordinal == 5
    report = buffer.rollback(START)
    assert (report.restored, report.removed) == ((0, 1, 2, 3), (4,))
    assert (buffer.capacity(), buffer.stats().next_ordinal) == (0, 4)
    assert buffer.stats().dropped_reasons == {}


def test_a_group_dropped_before_it_was_scored_is_requested_again(buffer: Buffer) -> None:
    request(buffer, 2, samples=4)
    leases = buffer.lease("a", 4, 60.0)
    finish(buffer, leases[:1])
    buffer.drop([0], "gave up")
    assert buffer.rollback(START).requested_again == (0, 1)
    sample_all(buffer)
    assert len(train(buffer)) == 2


def test_rollback_keeps_the_bound_when_it_undoes_drops(tmp_path: Path, clock: Clock) -> None:
    """Group 4 was admitted at step 0 because 3 was refused; with 3 back, it must be fresher."""
    buffer = open_at(tmp_path, clock, prompts=2, staleness=1)
    fill(buffer)
    buffer.drop([3], "no signal")
    fill(buffer)
    train(buffer)
    mark = buffer.watermark()
    assert mark == Watermark(step=1, version=1, next_ordinal=2, refused=0)
    report = buffer.rollback(mark)
    assert (report.restored, report.requested_again) == ((2, 3), (4,))
    for step in (1, 2):
        fill(buffer)
        for group in train(buffer):
            assert all(step - r.versions().min() <= 1 for r in group.rollouts)
    buffer.close()


def test_rollback_to_the_start_without_a_checkpoint(buffer: Buffer) -> None:
    assert buffer.rollback(START).restored == ()
    fill(buffer)
    train(buffer)
    train(buffer)
    report = buffer.rollback(START)
    assert (report.restored, report.dead_versions) == ((0, 1, 2, 3), (1, 2))
    assert (buffer.trained_ordinals(), buffer.next_version()) == ([], 3)


def test_an_empty_database_takes_the_watermark_as_its_baseline(tmp_path: Path, clock: Clock) -> None:
    mark = Watermark(step=7, version=9, next_ordinal=17, refused=3)
    buffer = open_at(tmp_path, clock)
    report = buffer.rollback(mark)
    assert report.restored == report.requested_again == report.dead_versions == ()
    assert buffer.watermark() == mark
    assert (buffer.stats().next_ordinal, buffer.capacity(), buffer.next_version()) == (17, 4, 10)
    fill(buffer)
    assert [g.ordinal for g in train(buffer)] == [17, 18]
    assert buffer.rollback(mark).restored == (17, 18, 19, 20)
    buffer.close()


@pytest.mark.parametrize("database", ["sqlite"], indirect=True)
def test_a_database_behind_the_checkpoint_catches_up(tmp_path: Path, clock: Clock) -> None:
    """After a power loss the checkpoint may know of a step the database does not."""
    buffer = open_at(tmp_path, clock)
    fill(buffer)
    buffer.close()
    shutil.copytree(tmp_path, tmp_path / "earlier")
    buffer = open_at(tmp_path, clock)
    train(buffer)
    mark = buffer.watermark()
    buffer.close()
    buffer = open_at(tmp_path / "earlier", clock)
    assert buffer.rollback(mark).restored == (2, 3)
    assert buffer.watermark() == mark
    assert [g.ordinal for g in train(buffer)] == [2, 3]
    buffer.close()


def test_commit_removes_payloads_of_covered_groups_only(tmp_path: Path, clock: Clock) -> None:
    buffer = open_at(tmp_path, clock)
    worker = open_at(tmp_path, clock)
    request(buffer, 4, samples=2)
    finish(worker, worker.lease("a", 4, 60.0))
    assert buffer.payloads() == 2
    train(buffer)
    assert buffer.payloads() == 2  # trained, and not yet committed
    buffer.commit(buffer.watermark())
    assert buffer.payloads() == 0
    finish(worker, worker.lease("a", 4, 60.0))
    buffer.commit(buffer.watermark())
    assert buffer.payloads() == 2
    assert len(train(buffer)) == 2
    buffer.commit(buffer.watermark())
    assert buffer.payloads() == 0
    assert buffer.trained_ordinals() == [0, 1, 2, 3]
    buffer.close()
    worker.close()


def test_commits_bound_the_disk(tmp_path: Path, clock: Clock, database: str) -> None:
    buffer, sizes = open_at(tmp_path, clock, prompts=8, slice_samples=1), []
    draw = np.random.default_rng(0)
    for _ in range(16):
        request(buffer, buffer.capacity(), samples=1)
        for lease in buffer.lease("a", 8, 60.0):
            found = replace(rollouts(lease)[0], text=str(draw.bytes(20_000)))
            buffer.submit(lease, [found])
            buffer.score(lease, verdicts(lease))
        train(buffer, 8)
        buffer.commit(buffer.watermark())
        with buffer._db.read() as connection:
            size = "SELECT pg_total_relation_size('payloads')" if database == "postgresql" else "PRAGMA page_count"
            sizes.append(connection.exec_driver_sql(size).scalar_one())
    assert max(sizes) <= 2.5 * max(sizes[:4])  # 4 without
    assert buffer.payloads() == 0
    buffer.close()


def test_dropped_groups_free_their_payloads_at_commit(buffer: Buffer) -> None:
    fill(buffer)
    buffer.drop([0, 1, 2, 3], "no signal")
    buffer.commit(START)
    assert buffer.payloads() > 0
    buffer.commit(buffer.watermark())
    assert buffer.payloads() == 0


def test_rollback_behind_the_last_commit(buffer: Buffer) -> None:
    """The newest checkpoint is unreadable and the run resumes from the one before it."""
    fill(buffer)
    old = buffer.watermark()
    train(buffer)
    buffer.commit(buffer.watermark())
    report = buffer.rollback(old)
    assert report.removed == (0, 1, 2, 3)  # the prompts are gone: the learner requests them again
    assert (buffer.stats().next_ordinal, buffer.capacity()) == (0, 4)
    fill(buffer)
    assert [g.ordinal for g in train(buffer)] == [0, 1]


def test_a_checkpoint_of_an_abandoned_lineage_is_refused(buffer: Buffer) -> None:
    """It drops group 0, which the surviving lineage has trained on since, at the same version."""
    fill(buffer)
    buffer.drop([0], "no signal")
    abandoned = buffer.watermark()
    assert abandoned == Watermark(step=0, version=0, next_ordinal=1, refused=1)
    buffer.rollback(START)
    train(buffer)
    with pytest.raises(BufferError, match="abandoned lineage"):
        buffer.rollback(abandoned)
    assert buffer.trained_ordinals() == [0, 1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"next_ordinal": 3}, "prompts_per_step"),
        ({"refused": 1}, "prompts_per_step"),
        ({"step": -1, "next_ordinal": -2}, "prompts_per_step"),
        ({"version": 2}, "of another run"),
        ({"version": 3}, "of another run"),
        ({"version": 2, "step": 2, "next_ordinal": 4}, "surviving lineage"),  # a dead version
        ({"version": 4}, "surviving lineage"),
    ],
)
def test_watermarks_of_other_runs_are_refused(buffer: Buffer, change: dict[str, int], message: str) -> None:
    fill(buffer)
    train(buffer)
    mark = buffer.watermark()
    train(buffer)
    buffer.rollback(mark)
    train(buffer)
    before = buffer.stats()
    assert before.version == 3
    wrong = replace(mark, **change)
    for verb in (buffer.commit, buffer.rollback):
        with pytest.raises(BufferError, match=message):
            verb(wrong)
    assert buffer.stats() == before


def test_versions_skip_after_a_rollback_and_steps_do_not(buffer: Buffer) -> None:
    request(buffer, 4, samples=2)
    sample_all(buffer)
    train(buffer)
    buffer.rollback(START)
    assert buffer.next_version() == 2
    sample_all(buffer)
    train(buffer)
    assert buffer.steps_of([0, 2]) == {0: 0, 2: 1}
