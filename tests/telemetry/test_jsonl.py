"""metrics.jsonl survives crashes, resumes and non-finite numbers."""

import json
import logging
import math
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlkit.telemetry.names import TelemetryError, is_warm_start
from rlkit.telemetry.record import RunRecord, read_metrics
from rlkit.telemetry.sinks import JsonlSink


def test_a_row_is_on_disk_before_the_next_one(tmp_path: Path) -> None:
    sink = JsonlSink(tmp_path)
    sink.log(1, {"reward/mean": np.float32(0.5), "learner/microbatches": 3})
    line = json.loads((tmp_path / "metrics.jsonl").read_text())
    assert line.keys() == {"step", "time", "seconds", "reward/mean", "learner/microbatches"}
    assert (line["step"], line["reward/mean"], line["learner/microbatches"]) == (1, 0.5, 3)
    sink.close()
    sink.close()


def test_not_finite_is_null_and_warned_once_a_name(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    sink = JsonlSink(tmp_path)
    with caplog.at_level(logging.WARNING):
        for step, value in enumerate((math.nan, math.inf, -math.inf, 1.0)):
            sink.log(step, {"policy/loss": value, "reward/mean": math.nan})
    sink.close()
    assert [row.metrics["policy/loss"] for row in read_metrics(tmp_path)] == [None, None, None, 1.0]
    assert len([r for r in caplog.records if "policy/loss" in r.message]) == 1
    assert len(caplog.records) == 2
    assert RunRecord(tmp_path).metric("policy/loss") == ([3], [1.0])


@pytest.mark.parametrize("value", ["0.5", [1.0], object()])
def test_what_is_not_a_number_is_refused(tmp_path: Path, value: object) -> None:
    sink = JsonlSink(tmp_path)
    with pytest.raises(TelemetryError, match=r"reward/mean"):
        sink.log(1, {"reward/mean": value})  # type: ignore[dict-item]
    sink.close()
    assert read_metrics(tmp_path) == []


@given(cut=st.integers(1, 200))
@settings(max_examples=30, deadline=None)
def test_a_torn_last_line_is_dropped_and_the_run_goes_on(cut: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "metrics.jsonl"
        sink = JsonlSink(Path(folder))
        for step in range(3):
            sink.log(step, {"reward/mean": step / 10})
        sink.close()
        whole = path.read_bytes()
        path.write_bytes(whole[: max(0, len(whole) - cut)])
        before = [row.step for row in read_metrics(Path(folder))]
        assert before == list(range(len(before)))
        sink = JsonlSink(Path(folder))
        sink.log(9, {"reward/mean": 0.9})
        sink.close()
        assert [row.step for row in read_metrics(Path(folder))] == [*before, 9]


def test_a_broken_line_in_the_middle_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    sink = JsonlSink(tmp_path)
    sink.log(1, {"reward/mean": 0.5})
    sink.close()
    good = path.read_text()
    path.write_text(good + "{broken\n" + good)
    with pytest.raises(TelemetryError, match="line 2"):
        read_metrics(tmp_path)
    with pytest.raises(TelemetryError, match="line 2"):
        JsonlSink(tmp_path)


def test_run_time_goes_on_where_the_last_process_stopped(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "time": 1.0, "seconds": 500.0, "reward/mean": 0.1}\n')
    sink = JsonlSink(tmp_path, resume_step=0)
    sink.log(1, {"reward/mean": 0.2})
    sink.close()
    (row,) = read_metrics(tmp_path)
    assert 500.0 <= row.seconds < 560.0


ROWS = st.lists(st.tuples(st.integers(0, 9), st.sampled_from(["reward/mean", "eval/a/avg@4", "sft/loss"])), max_size=12)


@given(rows=ROWS, step=st.integers(0, 9))
@settings(max_examples=40, deadline=None)
def test_rollback_removes_later_training_rows_only(rows: list[tuple[int, str]], step: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        sink = JsonlSink(Path(folder))
        for one, name in rows:
            sink.log(one, {name: 1.0})
        sink.close()
        sink = JsonlSink(Path(folder), resume_step=step)
        sink.log(99, {"reward/mean": 1.0})
        sink.close()
        expected = [(one, n) for one, n in rows if one <= step or n.startswith("sft/")]
        left = [(row.step, next(iter(row.metrics))) for row in read_metrics(Path(folder))]
        assert left == [*expected, (99, "reward/mean")]
        assert [p.name for p in Path(folder).iterdir()] == ["metrics.jsonl"]


def test_the_later_row_of_a_step_counts(tmp_path: Path) -> None:
    sink = JsonlSink(tmp_path)
    for step, value in ((2, 0.1), (1, 0.2), (2, 0.3)):
        sink.log(step, {"reward/mean": value})
    sink.log(5, {"sft/loss": 1.0})
    sink.close()
    rows = read_metrics(tmp_path)
    assert RunRecord(tmp_path).metric("reward/mean") == ([1, 2], [0.2, 0.3])
    assert [is_warm_start(row.metrics) for row in rows] == [False] * 3 + [True]


def test_no_file_is_no_rows(tmp_path: Path) -> None:
    assert read_metrics(tmp_path) == []
