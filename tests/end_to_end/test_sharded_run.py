"""A run whose learner is sharded over two ranks, ended in between and gone on with by one rank."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
from runs import running, settings, step, trained, until
from safetensors.torch import load_file

from rlkit.cli import main

pytestmark = pytest.mark.slow


def test_it_is_the_run_of_one_rank_to_rounding(tmp_path: Path) -> None:
    whole = ["steps=24", "checkpoint.every_steps=4", "rollout.verify_every=1"]
    assert main(["train", *settings(tmp_path, "local", *whole)]) == 0
    arguments = settings(tmp_path, "sharded", *whole, "rollout.workers=1")
    local, sharded = tmp_path / "local", tmp_path / "sharded"
    with running("train", [*arguments, "learner.processes=2", "learner.sharded=true"]) as first:
        until(lambda: step(sharded) >= 2, first.text())
        first.process.send_signal(signal.SIGTERM)
        assert first.ended() == 128 + signal.SIGTERM, first.text()
        before = step(sharded)
        assert 2 <= before < 24 and (sharded / f"checkpoints/step_{before}").exists()
    with running("train", arguments) as second:
        assert second.ended() == 0, second.text()
        assert f"step_{before} (step {before})" in second.text()
    assert trained(sharded) == trained(local) == list(range(96))
    a, b = (load_file(run / "checkpoints/step_24/model.safetensors") for run in (local, sharded))
    assert a.keys() == b.keys() and all(float((a[k] - b[k]).norm() / a[k].norm()) < 1e-5 for k in a)
