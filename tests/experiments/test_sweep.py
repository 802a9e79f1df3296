"""`rlkit sweep`: killed twice and resumed it gives the table of an undisturbed sweep; bad input before any run."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from tiny import TINY

from rlkit.cli import main
from rlkit.errors import ConfigError
from rlkit.experiments.compare import compare, find_variants
from rlkit.experiments.sweep import plan

SHORT = ("checkpoint.every_steps=2", "steps=8")


def test_plan_is_the_product_of_what_is_swept(tmp_path: Path) -> None:
    root, runs = plan(
        "quickstart", ["name=all", f"output_dir={tmp_path}", "algorithm=grpo,rloo", "seed=0,1", "steps=3"], None
    )
    assert root == tmp_path / "all"
    places = [str(run.folder.relative_to(root)) for run in runs]
    assert places == ["grpo/seed_0", "grpo/seed_1", "rloo/seed_0", "rloo/seed_1"]
    assert {run.recipe["steps"] for run in runs} == {3} and not any(run.finished for run in runs)
    _, several = plan("quickstart", ["algorithm=grpo,rloo", "learner.learning_rate=1e-3,1e-4"], None)
    assert [run.folder.parent.name for run in several] == ["grpo_0.001", "grpo_0.0001", "rloo_0.001", "rloo_0.0001"]


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        (["algorithm=grpo,rlooo"], "rlooo"),
        (["samples_per_prompt=1,8"], "samples_per_prompt"),
        (["seed=0,0"], "the same folder"),
        (["seed=0,,1"], "cannot be read"),
    ],
)
def test_bad_input_is_found_before_any_run(overrides: list[str], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        plan("quickstart", overrides, None)


def arguments(folder: Path) -> list[str]:
    swept = ["algorithm=mean_centred_token_mean,rloo", "seed=0,1", "name=sweep"]
    return ["sweep", *TINY, *SHORT, *swept, f"output_dir={folder}", f"sft.cache_dir={folder}/cache"]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_sweep_killed_twice_gives_the_same_table(tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert main([*arguments(whole), "--jobs", "2"]) == 0
    for number, progress in ((signal.SIGKILL, 1), (signal.SIGTERM, 6)):
        process = subprocess.Popen(
            [sys.executable, "-m", "rlkit", *arguments(killed)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        try:
            end = time.monotonic() + 180
            while len(list(killed.glob("sweep/*/*/rollouts/*.parquet"))) < progress and process.poll() is None:
                assert time.monotonic() < end, "no progress"
                time.sleep(0.05)
            children = psutil.Process(process.pid).children(recursive=True)
            os.kill(process.pid, number)
            process.wait(timeout=120)
        finally:
            process.kill()
            process.wait()
        gone, alive = psutil.wait_procs(children, timeout=60)
        assert children and not alive
    assert main(arguments(killed)) == 0
    assert main(arguments(killed)) == 0  # nothing left to do
    tables = []
    for folder in (whole, killed):
        variants = find_variants([folder / "sweep"])
        rows = compare(variants, "heldout/avg@4", "rloo")
        tables.append({row.variant.name: (row.after, row.difference) for row in rows})
        rewards = {(v.name, s): run.metric("reward/mean") for v in variants for s, run in v.runs.items()}
        assert all(steps == list(range(1, 9)) for steps, _ in rewards.values())
        tables.append(rewards)
    assert tables[0] == tables[2] and tables[1] == tables[3]
    assert main([*arguments(killed), "seed=0"]) == 2
