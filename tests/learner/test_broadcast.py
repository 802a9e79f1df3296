"""Weights to servers that the learner sends to: who gets them, what becomes of one that fails, and on every rank."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn

from rlkit.buffer.sql import SqlBuffer
from rlkit.errors import EngineError
from rlkit.learner import broadcast as module
from rlkit.learner.broadcast import Broadcast

HERE = Path(__file__).parent
MODEL = nn.Linear(3, 2)


class Recorder:
    """A sender that keeps what it is given, and does what `plan` says instead for a URL and version."""

    def __init__(self, url: str, log: list[Any], plan: dict[Any, Any]) -> None:
        self.url, self.log, self.plan, self.closed = url, log, plan, threading.Event()
        if url in plan:
            raise plan[url]

    def send(self, version, tensors):
        if problem := self.plan.get((self.url, version)):
            next(tensors)
            problem(self)
        self.log.append((self.url, version, {name: tensor.clone() for name, tensor in tensors}))

    def close(self):
        self.closed.set()
        self.log.append((self.url, "closed"))


class Recording(NamedTuple):
    """Of an engine's settings, what the learner uses."""

    log: list[Any]
    plan: dict[Any, Any]
    update_timeout_s: float

    def sender(self, url: str, model: nn.Module) -> Recorder:
        return Recorder(url, self.log, self.plan)


def fails(_: Recorder) -> None:
    raise ConnectionError("gone")


def hangs(sender: Recorder) -> None:
    sender.closed.wait(60.0)
    raise ConnectionAbortedError


def deaf(_: Recorder) -> None:
    time.sleep(3.0)


@pytest.fixture
def made(tmp_path: Path):
    now = [0.0]
    buffer = SqlBuffer(
        f"sqlite:///{tmp_path}/b.db", payload_dir=tmp_path, run="run", prompts_per_step=1, max_staleness=0,
        slice_samples=1, clock=lambda: now[0],
    )  # fmt: skip
    learner: Any = SimpleNamespace(model=MODEL, accelerator=SimpleNamespace(device=torch.device("cpu")))
    learner.together = lambda work, here=None: (here or work)(learner)
    log, plan = list[Any](), dict[Any, Any]()
    it = Broadcast(buffer, learner, Recording(log, plan, 0.5), within_s=30.0)

    def served(version: int) -> list[tuple[Any, ...]]:
        log.clear()
        it.serve(version)
        return [x[:2] for x in log]

    return SimpleNamespace(buffer=buffer, it=it, log=log, plan=plan, served=served, now=now)


def test_whoever_is_there_gets_every_version_once(made: Any) -> None:
    assert made.served(0) == []
    made.buffer.report("worker-a", {"samples": 1.0}, ["http://a", "http://b"])
    assert made.served(0) == [("http://a", 0), ("http://b", 0)]
    assert all(torch.equal(made.log[0][2][name], p) for name, p in MODEL.named_parameters())
    assert made.served(0) == []
    made.buffer.report("worker-b", {}, ["http://c"])
    assert made.served(0) == [("http://c", 0)]  # a new one, while the others have it
    made.now[0] = 20.0
    made.buffer.report("worker-b", {}, ["http://c"])
    made.now[0] = 40.0
    assert sorted(made.served(1), key=str) == [("http://a", "closed"), ("http://b", "closed"), ("http://c", 1)]
    assert made.buffer.reports(30.0) == {"worker-b": {}} and list(made.it.senders) == ["http://c"]


def test_one_that_fails_is_left_and_the_others_are_served(made: Any, capsys: Any) -> None:
    made.buffer.report("worker", {}, ["http://a", "http://b", "http://c"])
    made.plan |= {("http://b", 1): fails, ("http://c", 2): hangs, "http://d": OSError("refused")}
    assert len(made.served(0)) == 3
    assert made.served(1) == [("http://a", 1), ("http://b", "closed"), ("http://c", 1)]
    assert "http://b is left: ConnectionError gone" in capsys.readouterr().out
    started = time.monotonic()
    assert made.served(2) == [("http://a", 2), ("http://c", "closed")]  # b is not tried again
    assert time.monotonic() - started < 10.0
    assert "http://c is left: TimeoutError version 2 was not taken within 0.5 s" in capsys.readouterr().out
    made.buffer.report("worker", {}, ["http://a", "http://d"])
    assert made.served(3) == [("http://a", 3)]
    assert "http://d is left: OSError refused" in capsys.readouterr().out and list(made.it.senders) == ["http://a"]


def test_one_that_cannot_be_ended_ends_the_learner(made: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(module, "ABORT_S", 0.1)
    made.buffer.report("worker", {}, ["http://a"])
    made.plan[("http://a", 0)] = deaf
    with pytest.raises(EngineError, match="http://a"):
        made.served(0)
    assert EngineError.passing  # the supervisor starts it again


@pytest.mark.slow
def test_two_sharded_ranks_send_whole_tensors_and_survive_a_failure(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    more = {"PYTHONPATH": os.pathsep.join([str(HERE), os.getcwd()]), "OMP_NUM_THREADS": "1"}
    environment = os.environ | more | {"ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(
        [*command, str(HERE / "broadcast_job.py"), str(tmp_path)], env=environment, capture_output=True, text=True,
        timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "every rank took part" in done.stdout
