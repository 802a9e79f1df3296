"""One and two gloo ranks give the same gradient: 1e-10 in float64, 1e-5 in float32."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

HERE = Path(__file__).parent


def gradient(ranks: int, dtype: str, loss: str, file: Path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += [f"--nproc-per-node={ranks}", str(HERE / "gradient_job.py"), dtype, str(file), loss]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(HERE), os.getcwd()]),
        "OMP_NUM_THREADS": "1",
        "ACCELERATE_USE_CPU": "true",
    }
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    return load_file(file)["gradient"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dtype", "bound", "loss"),
    [(*kind, loss) for kind in (("float64", 1e-10), ("float32", 1e-5)) for loss in ("tokens", "groups")]
    + [("float64", 1e-8, "likelihood")],
)
def test_two_ranks_give_the_gradient_of_one(tmp_path, dtype, bound, loss):
    one = gradient(1, dtype, loss, tmp_path / "one")
    two = gradient(2, dtype, loss, tmp_path / "two")
    assert one.norm() > 0
    assert (one - two).norm() / one.norm() <= bound
