"""Learner, workers and evaluator as processes of one run: what they compute, and what becomes of it when they die."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sqlite3
import time
from pathlib import Path

import psutil
import pytest
from runs import Command, evaluated, metrics, rows, running, settings, step, trained, until
from safetensors.torch import load_file

from rlkit.cli import main
from rlkit.telemetry.rollouts import read_rollouts

pytestmark = pytest.mark.slow


def test_zero_staleness_with_a_worker_is_the_in_process_run_bit_for_bit(tmp_path):
    """Also when it is ended by SIGTERM in between."""
    whole = ["steps=24", "evaluation.every_steps=8", "checkpoint.every_steps=8"]
    assert main(["train", *settings(tmp_path, "local", *whole)]) == 0
    arguments = settings(tmp_path, "remote", *whole, "rollout.workers=1")
    local, remote = tmp_path / "local", tmp_path / "remote"
    with running("train", arguments) as first:
        until(lambda: step(remote) >= 2)
        first.process.send_signal(signal.SIGTERM)
        assert first.ended() == 128 + signal.SIGTERM, first.text()
        assert "the same command goes on from the checkpoint" in first.text()
        before = step(remote)
        assert 2 <= before < 24
        assert (remote / "checkpoints" / f"step_{before}").exists()
    with running("train", arguments) as second:
        assert second.ended() == 0, second.text()
        assert f"resuming from {remote}/checkpoints/step_{before}" in second.text().replace("\n   learner | ", "")
    assert trained(remote) == trained(local) == list(range(96))
    a, b = (load_file(run / "checkpoints/step_24/model.safetensors") for run in (local, remote))
    assert a.keys() == b.keys() and all(bool((a[k] == b[k]).all()) for k in a)
    others = ("queue/", "workers/", "weights/", "eval/")
    a, b = ([row for row in metrics(run, *others) if "reward/mean" in row] for run in (local, remote))
    assert a == b
    assert evaluated(local) == evaluated(remote) and sorted(evaluated(remote)) == [0, 8, 16, 24]


def test_worker_and_learner_are_killed_and_the_run_ends_as_it_should(tmp_path, capsys):
    arguments = settings(tmp_path, "run", "steps=40", "checkpoint.every_steps=5", "checkpoint.keep=9")
    arguments += ["evaluation.every_steps=20", "max_staleness=1"]
    run = tmp_path / "run"
    with running("train", [*arguments, "rollout.workers=2"]) as it:
        until(lambda: step(run) >= 2)
        # A second run in the same folder, and the folder moved aside under the first one, are refused.
        with running("train", [*arguments, "rollout.workers=2", "resume=never"]) as second:
            it.part("worker").kill()
            until(lambda: "worker-0 ended with signal 9" in it.text() or "worker-1 ended with signal 9" in it.text())
            until(lambda: step(run) >= 8)
            it.part("learner").kill()
            until(lambda: "learner ended with signal 9" in it.text())
            assert second.ended() == 2
        assert it.ended() == 0, it.text()
    assert "another process is using this run folder" in it.text() and not (tmp_path / "run.1").exists()
    assert json.loads((run / "supervisor.json").read_text()) == pytest.approx(
        {"learner": 1, "worker-0": 0.5, "worker-1": 0.5, "evaluator": 0}, abs=0.5
    )
    assert trained(run) == list(range(160))
    assert [row["step"] for row in metrics(run) if "reward/mean" in row] == list(range(1, 41))
    # Whatever was trained on is at most one step old.
    made = dict(rows(run, "SELECT version, step FROM versions"))
    live = rows(run, "SELECT step FROM versions WHERE live ORDER BY version")
    assert live == [(n,) for n in range(41)] and len(made) > 41
    lags = {n - 1 - made[v] for n in range(1, 41) for row in read_rollouts(run, n) for v in row["versions"]}
    assert lags <= {0, 1} and 1 in lags
    # Evaluations are of the weights they name.
    assert sorted(evaluated(run)) == [0, 20, 40]
    for after in (20, 40):
        capsys.readouterr()
        assert main(["eval", *arguments, "--checkpoint", str(run / f"checkpoints/step_{after}")]) == 0
        assert json.loads(capsys.readouterr().out) == evaluated(run)[after]


def test_stopped_parts_are_noticed_and_the_run_recovers(tmp_path):
    """SIGSTOP of every part, of the supervisor, and of a worker without one, whose late samples are refused."""
    run = tmp_path / "run"
    assert main(["train", *settings(tmp_path, "run", "steps=1")]) == 0
    assert main(["train", *settings(tmp_path, "run", "steps=1", "resume=never")]) == 0
    assert (tmp_path / "run.1" / "summary.json").exists()
    endless = ["steps=100000", "checkpoint.every_steps=10", "evaluation.every_steps=10", "max_staleness=1"]
    arguments = settings(tmp_path, "run", *endless, "rollout.lease_timeout_s=3", "rollout.slice_samples=2")
    silence = {"RLKIT_SILENCE_S": "10"}
    with running("train", [*arguments, "rollout.workers=1", "resume=never"], **silence) as it:
        until(lambda: (tmp_path / "run.2" / "summary.json").exists())
        until(lambda: step(run) >= 1)
        with running("worker", arguments) as guest:
            stopped_under_a_lease(run, guest)
            guest.process.terminate()
            assert guest.ended() == 128 + signal.SIGTERM
        for name in ("worker", "evaluator", "learner"):
            part = it.part(name)
            part.suspend()
            while locked(run):
                part.resume()
                time.sleep(0.1)
                part.suspend()
        for name in ("worker-0", "evaluator", "learner"):
            until(lambda name=name: f"{name} was silent for 10 s and is killed" in it.text(), "not noticed")
        assert "stopped, heard" in it.text()
        parts = [until(lambda name=name: it.part(name)) for name in ("worker", "evaluator", "learner")]
        first = step(run)
        until(lambda: step(run) > first, it.text())
        it.process.send_signal(signal.SIGSTOP)
        until(lambda: not any(x.is_running() and x.status() != psutil.STATUS_ZOMBIE for x in parts), "they go on")
        for name in ("worker-0", "evaluator", "learner"):
            assert "was silent for 10 s: this process ends" in (run / "logs" / f"{name}.log").read_text()
        first = step(run)
        it.process.send_signal(signal.SIGCONT)
        until(lambda: step(run) > first, it.text())
        it.process.terminate()
        assert it.ended() == 128 + signal.SIGTERM
    done = trained(run)
    assert done == list(range(len(done)))


def locked(run: Path) -> bool:
    """Whether somebody is writing: SQLite cannot take that from a process that is stopped."""
    with contextlib.closing(sqlite3.connect(run / "buffer.db", timeout=1, isolation_level=None)) as connection:
        try:
            connection.execute("BEGIN IMMEDIATE")
        except sqlite3.OperationalError:
            return True
        connection.execute("ROLLBACK")
        return False


def stopped_under_a_lease(run: Path, guest: Command) -> None:
    """Stop a worker that holds leases until others have them, and wake it: what it hands in then is refused."""
    name = f"worker-{os.uname().nodename}-{guest.process.pid}"
    own = f"SELECT count(*) FROM slices WHERE worker_id = '{name}' AND state = 'leased'"

    def caught() -> bool:
        until(lambda: rows(run, own)[0][0])
        guest.process.send_signal(signal.SIGSTOP)
        time.sleep(0.2)
        if rows(run, own)[0][0] and not locked(run):
            return True
        guest.process.send_signal(signal.SIGCONT)
        return False

    until(caught)
    until(lambda: not rows(run, own)[0][0], "its leases do not expire")
    before = rows(run, "SELECT fenced_writes FROM meta")[0][0]
    guest.process.send_signal(signal.SIGCONT)
    until(lambda: rows(run, "SELECT fenced_writes FROM meta")[0][0] > before, "what it hands in is not refused")
    until(lambda: rows(run, own)[0][0], "it does not go on with other work")
