"""Ranks that sample together: real processes under torchrun."""

import json
import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent


def test_two_ranks_sample_what_one_does_and_a_signal_on_either_is_heard(tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += [str(HERE / "ranks_job.py"), str(tmp_path / "out.json")]
    path = os.pathsep.join([str(HERE), str(HERE.parents[1]), os.environ.get("PYTHONPATH", "")])
    env = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "out.json").read_text())
    assert [row[:3] for row in found["rollouts"]] == [row[:3] for row in found["alone"]]
    assert len(found["rollouts"]) == 32
    for ordinal, _, _, engine_id, versions in found["rollouts"]:
        assert engine_id == f"embedded-{ordinal // 4}" and set(versions) == {7}  # half of the 8 prompts each
    assert found["stopped"]
