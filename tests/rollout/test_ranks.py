"""Ranks that sample together: real processes under torchrun."""

import json
import os
import subprocess
import sys
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from rlkit.rollout.ranks import GenerateOrder

HERE = Path(__file__).parent


@given(st.integers(0, 300), st.integers(1, 9))
def test_the_shares_of_all_ranks_are_the_requests(count: int, ranks: int):
    """In order, each once; rank 0's is the smallest, the others are even."""
    order = GenerateOrder([*range(count)], None, 0)
    shares = [order.share(rank, ranks) for rank in range(ranks)]
    assert sum(shares, []) == [*range(count)]
    first, *others = map(len, shares)
    assert not others or (max(others) - min(others) <= 1 and first <= min(others))


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
    for ordinal, index, _, engine_id, versions in found["rollouts"]:
        spared = 13  # of 32: rank 0 has other work besides
        assert engine_id == f"embedded-{int(4 * ordinal + index >= spared)}" and set(versions) == {7}
    assert found["stopped"]
