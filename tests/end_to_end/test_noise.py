"""A noisy verifier whose false negatives are estimated from appeals: the estimate survives resume and interruption."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tiny import TINY

from rlkit.cli import main
from rlkit.errors import Interrupted
from rlkit.learner.update import Learner

pytestmark = pytest.mark.slow
RATE = "advantage/correction/false_negative_rate"


def arguments(folder: Path, name: str, steps: int) -> list[str]:
    appeals = "{_target_: rewards.noise_injection.Appeals, weight: 0, rule: '${reward.rewards.correct}'"
    appeals += ", appeal: '${reward.rewards.clean}', fraction: 0.5}"
    estimate = ["algorithm.advantage.false_negative_rate=null", "algorithm.advantage.estimate=appeal"]
    places = [f"output_dir={folder}", f"sft.cache_dir={folder}/cache", f"name={name}", f"steps={steps}"]
    noise = ["recipe=quickstart_noise", "algorithm=noise_forward", f"+reward.rewards.appeal={appeals}", *estimate]
    return ["train", *TINY[1:], *noise, *places, "sft.steps=150", "checkpoint.every_steps=3"]


def rows(run: Path) -> list[dict[str, float]]:
    found = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    timed = ("time", "seconds", "perf/")
    return [{k: v for k, v in row.items() if not k.startswith(timed)} for row in found if "reward/mean" in row]


def test_a_resumed_or_interrupted_run_estimates_as_an_uninterrupted_one(tmp_path, monkeypatch):
    assert main(arguments(tmp_path, "whole", 8)) == 0
    whole = rows(tmp_path / "whole")
    assert len({row[RATE] for row in whole}) > 3  # it does move

    assert main(arguments(tmp_path, "parts", 4)) == 0
    learn, calls = Learner.step, []

    def interrupted_once(self, sequences, check_stop):
        calls.append(1)
        if len(calls) == 2:
            raise Interrupted("a signal, after the estimate moved and before the weights do")
        return learn(self, sequences, check_stop)

    monkeypatch.setattr(Learner, "step", interrupted_once)
    assert main(arguments(tmp_path, "parts", 8)) != 0
    assert not (tmp_path / "parts/checkpoints/step_6").exists()
    state = json.loads((tmp_path / "parts/checkpoints/step_5/trainer/state.json").read_text())["state"]["advantage"]
    assert state == {"false_negative_rate": whole[4][RATE]}
    assert main(arguments(tmp_path, "parts", 8)) == 0
    assert rows(tmp_path / "parts") == whole
