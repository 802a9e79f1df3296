"""What a budget is told of a prompt's earlier groups: the surviving lineage, once each."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from buffer_work import Buffer, Clock, open_at, prompt, rollouts, sample_all, train
from sqlalchemy import event

from rlkit.buffer.protocol import GroupRequest
from rlkit.types import Verdict

pytestmark = pytest.mark.usefixtures("database")


def request(buffer: Buffer, *names: str, samples: int = 4) -> None:
    first = buffer.stats().next_ordinal
    prompts = [replace(prompt(first + i), id=name) for i, name in enumerate(names)]
    buffer.request([GroupRequest(ordinal=first + i, prompt=p, samples=samples) for i, p in enumerate(prompts)])


def scores(buffer: Buffer, *names: str, latest: int = 16) -> dict[str, list[list[float]]]:
    found = buffer.history(names, latest)
    return {name: [[score for score, _ in group] for group in groups] for name, groups in found.items()}


def test_only_taken_groups_count_the_newest_first(buffer: Buffer) -> None:
    """Samples of a test score their index."""
    request(buffer, "a", "b", "a")
    sample_all(buffer)
    assert buffer.history(["a", "b"], 16) == {}  # the answer does not depend on how far workers are
    train(buffer)
    request(buffer, "a", "c", samples=3)
    sample_all(buffer)
    taken = buffer.take(2)
    assert taken is not None
    assert scores(buffer, "a", "b", "c") == {
        "a": [[0.0, 1.0, 2.0], [0.0, 1.0, 2.0, 3.0], [0.0, 1.0, 2.0, 3.0]],
        "b": [[0.0, 1.0, 2.0, 3.0]],
    }
    assert scores(buffer, "a", latest=1) == {"a": [[0.0, 1.0, 2.0]]}
    lengths = [len(r.token_ids) for r in taken[1].rollouts]
    assert [tokens for _, tokens in buffer.history(["a"], 1)["a"][0]] == lengths
    assert buffer.history([], 16) == {}


def test_unscored_samples_are_left_out_and_dropped_groups_count(buffer: Buffer) -> None:
    request(buffer, "a", "b", samples=2)
    for lease in buffer.lease("w", 8, 60.0):
        buffer.submit(lease, rollouts(lease))
        buffer.score(lease, [Verdict(score=None, reason="timeout"), Verdict(score=1.0)])
    buffer.take(2)
    buffer.drop([0], "all equal")
    assert scores(buffer, "a", "b") == {"a": [[1.0]], "b": [[1.0]]}


def test_history_survives_commit_and_the_process_and_rolled_back_groups_do_not_count_twice(
    tmp_path: Path, clock: Clock
) -> None:
    buffer = open_at(tmp_path, clock)
    request(buffer, "a", "b")
    sample_all(buffer)
    train(buffer)
    mark = buffer.watermark()
    buffer.commit(mark)
    before = buffer.history(["a", "b"], 16)
    request(buffer, "a", "b", "a", "b")
    sample_all(buffer)
    train(buffer)
    after = buffer.history(["a", "b"], 16)
    buffer.take(1)
    assert {name: len(x) for name, x in buffer.history(["a", "b"], 16).items()} == {"a": 3, "b": 2}
    buffer.close()

    buffer = open_at(tmp_path, clock)
    assert buffer.rollback(mark).restored == (2, 3, 4, 5)
    assert buffer.history(["a", "b"], 16) == before
    train(buffer)
    assert buffer.history(["a", "b"], 16) == after
    buffer.close()


def test_history_is_one_query(buffer: Buffer) -> None:
    request(buffer, "a", "b")
    sample_all(buffer)
    train(buffer)
    seen: list[str] = []
    event.listen(buffer._db._engine, "before_cursor_execute", lambda *given: seen.append(given[2]))
    buffer.history(["a", "b", "c"], 16)
    assert len([x for x in seen if x.startswith("SELECT")]) == 1
