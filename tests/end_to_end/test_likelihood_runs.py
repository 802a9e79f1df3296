"""Whole runs on likelihood rewards: with and without verifiers, on one rank, and their evaluation."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tiny import TINY

from rlkit.cli import main
from rlkit.telemetry.rollouts import read_rollouts

pytestmark = pytest.mark.slow
RECIPE = ["recipe=quickstart_likelihood", *(o for o in TINY if not o.startswith("recipe=")), "steps=2"]
NO_VERIFIER = ["~reward.rewards.correct", "evaluation.part=null"]


def settings(folder: Path, name: str, *more: str) -> list[str]:
    return [*RECIPE, f"output_dir={folder}", f"sft.cache_dir={folder}/cache", f"name={name}", *more]


@pytest.mark.parametrize(
    "more",
    [
        NO_VERIFIER,
        ["reward=jepo", "algorithm=jepo"],
        ["reward=rlpr", "algorithm=grpo"],
        ["reward=nover", "algorithm/kl=reference"],
        ["reward=prob", "algorithm/loss=importance_weighted", "learner.updates_per_step=2"],
        ["reward=avg_prob", "reward.likelihood.missing=drop", "reward.max_unscored_frac=1"],
    ],
)
def test_two_steps_and_an_evaluation(tmp_path, capsys, more):
    assert main(["train", *settings(tmp_path, "run", *more)]) == 0
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    steps = [row for row in rows if "reward/mean" in row]
    assert len(steps) == 2 and all(row["policy/grad_norm"] > 0 for row in steps)
    assert all("group/all_wrong_frac" not in row and "reward/likelihood/mean" in row for row in steps)
    held_out = [row for row in rows if "eval/heldout/logprob@4" in row]
    assert [row["step"] for row in held_out] == [0, 2]
    verified = more != NO_VERIFIER
    assert all(("eval/heldout/avg@4" in row) is verified for row in held_out)
    assert "likelihood" in read_rollouts(tmp_path / "run", 1)[0]["parts"]
    shown = capsys.readouterr().out
    assert "logprob@4" in shown
    checkpoint = ["--checkpoint", str(tmp_path / "run" / "checkpoints" / "step_2")]
    assert main(["eval", *settings(tmp_path, "run", *more), *checkpoint]) == 0
    printed = capsys.readouterr().out
    again = json.loads(printed[printed.index("{") :])
    assert again == pytest.approx({k: v for k, v in held_out[-1].items() if k.startswith("eval/")}, rel=1e-4, abs=1e-6)


def test_a_reference_that_fits_nowhere_is_refused_before_the_warm_start(tmp_path, capsys):
    assert main(["train", *settings(tmp_path, "run", "rollout.max_completion_tokens=2")]) != 0
    assert "no reference fits" in "".join(capsys.readouterr())
    assert not (tmp_path / "cache").exists()


def test_dropping_every_sample_ends_the_run(tmp_path, capsys):
    more = ["reward=avg_prob", "reward.likelihood.missing=drop", 'reward.likelihood.delimiter="99999999"']
    assert main(["train", *settings(tmp_path, "run", *more, "evaluation.at_start=false", "sft.steps=1")]) != 0
    shown = "".join(capsys.readouterr())
    assert "reward.max_unscored_frac" in shown and "does not end with the delimiter" in shown
