"""`rlkit train budget=knapsack` whole: sizes follow each prompt's own history, also across a kill."""

from __future__ import annotations

import contextlib
import json
import os
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tiny import TINY

from rlkit.budget.knapsack import allocate
from rlkit.cli import main
from rlkit.telemetry.rollouts import read_rollouts

pytestmark = pytest.mark.slow

# Prompts whose text differs in length pass at different rates: some never, some always, most now and then.
REWARD = """
import hashlib

def coin(sample):
    digest = hashlib.sha256((sample.prompt + "/" + sample.completion).encode()).digest()
    hard = hashlib.sha256(sample.prompt.encode()).digest()[0] % 4
    return float(digest[0] % 4 < hard)
"""
FINITE = [
    "budget=knapsack", "budget.minimum=4", "budget.high=12", "data.train.source.size=8", "rollout.slice_samples=5",
    "reward.rewards={coin: {_target_: coin.coin}}", "~reward.rewards.correct", "evaluation.at_start=false",
]  # fmt: skip


@pytest.fixture
def arguments(tmp_path, monkeypatch):
    (tmp_path / "coin.py").write_text(REWARD)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", os.getcwd())]))

    def of(name: str, *more: str) -> list[str]:
        return [*TINY, f"output_dir={tmp_path}", f"sft.cache_dir={tmp_path}/cache", f"name={name}", *FINITE, *more]

    return of


def sizes(run: Path) -> list[tuple[int, str, int]]:
    with contextlib.closing(sqlite3.connect(run / "buffer.db")) as connection:
        return connection.execute("SELECT ordinal, prompt_id, samples FROM groups ORDER BY ordinal").fetchall()


def steps(run: Path) -> list[dict[str, float]]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if "reward/mean" in row]


def test_the_second_epoch_is_allocated_by_the_first(tmp_path, arguments):
    """8 prompts, 4 a step: epochs of 2 steps."""
    more = ["steps=4", "learner.updates_per_step=2", "algorithm/aggregation=prompt_mean"]
    assert main(["train", *arguments("run", *more)]) == 0
    run = tmp_path / "run"
    found = sizes(run)
    assert [n for _, _, n in found[:8]] == [4] * 8
    for step in (3, 4):
        rate = {}
        for row in (x for earlier in range(1, step) for x in read_rollouts(run, earlier)):
            rate.setdefault(row["prompt_id"], []).append(row["score"])
        of_step = found[4 * (step - 1) : 4 * step]
        rates = [sum(rate[name]) / len(rate[name]) for _, name, _ in of_step]
        assert [n for _, _, n in of_step] == allocate(rates, 16, 2, 12)
        rows = read_rollouts(run, step)
        assert len(rows) == 16
        sampled = [[r["index"] for r in rows if r["ordinal"] == k] for k, _, _ in of_step]
        assert [sorted(x) for x in sampled] == [list(range(n)) for _, _, n in of_step]
        metrics = steps(run)[step - 1]
        assert (metrics["group/size/mean"], metrics["group/size/max"]) == (4.0, max(n for _, _, n in of_step))
    assert max(n for _, _, n in found) > 5  # more than one slice


def test_a_killed_run_allocates_what_an_uninterrupted_one_does(tmp_path, arguments):
    more = ["steps=9", "checkpoint.every_steps=4"]
    command = [sys.executable, "-m", "rlkit", "train", *arguments("killed", *more)]
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    try:
        end = time.monotonic() + 120
        while not (killed / "rollouts" / "step_6.parquet").exists():
            assert process.poll() is None, process.stderr.read().decode()
            assert time.monotonic() < end
            time.sleep(0.02)
    finally:
        process.kill()
        process.communicate()
    assert main(["train", *arguments("killed", *more)]) == 0
    assert main(["train", *arguments("whole", *more)]) == 0
    assert sizes(killed) == sizes(whole)
    assert len({n for _, _, n in sizes(whole)[8:]}) > 1
    for step in range(1, 10):
        keys = ("ordinal", "index", "token_ids", "advantage")
        assert [[r[k] for k in keys] for r in read_rollouts(killed, step)] == [
            [r[k] for k in keys] for r in read_rollouts(whole, step)
        ]
