"""FSDP2 on two gloo ranks does what one learner does by itself, and their checkpoints are of one kind."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

HERE = Path(__file__).parent
CASES = {
    "plain": {"dtype": "float32"},
    "everything": {"architecture": "untied", "kl": True, "updates": 2, "checkpointing": True},
    "groups": {"loss": "groups", "updates": 2},
    "gpt2": {"architecture": "gpt2"},
}


def job(ranks: int, cases: dict[Path, dict]) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    command += [str(HERE / "sharded_job.py"), json.dumps({str(k): v for k, v in cases.items()})]
    more = {"PYTHONPATH": os.pathsep.join([str(HERE), os.getcwd()]), "OMP_NUM_THREADS": "1"}
    environment = os.environ | more | {"ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=170)
    assert done.returncode == 0, done.stdout + done.stderr


def difference(one: Path, two: Path) -> float:
    """Largest relative one of a tensor."""
    a, b = load_file(one), load_file(two)
    assert a.keys() == b.keys() and all(a[k].shape == b[k].shape and a[k].dtype == b[k].dtype for k in a)
    return max(float((a[k].double() - b[k].double()).norm() / a[k].double().norm().clamp(min=1e-12)) for k in a)


def same(one: Path, two: Path, step: int, bound: float = 1e-10) -> None:
    checkpoint = f"checkpoints/step_{step}"
    files = "snapshots/v0", f"{checkpoint}/model", f"{checkpoint}/trainer/optimizer", "gradients"
    assert {
        name: d for name in files if not (d := difference(*(x / f"{name}.safetensors" for x in (one, two)))) <= bound
    } == {}
    a, b = (json.loads((x / "found.json").read_text()) for x in (one, two))
    assert a["norms"] == pytest.approx(b["norms"], rel=bound) and a["probe"] == pytest.approx(b["probe"], abs=bound)
    for x, y in zip(a["metrics"], b["metrics"], strict=True):
        del x["learner/microbatches"], y["learner/microbatches"]  # of a rank
        assert x == pytest.approx(y, rel=10 * bound, abs=bound)


@pytest.mark.slow
def test_two_sharded_ranks_are_one_learner(tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    job(1, {one / name: case | {"sharded": False} for name, case in CASES.items()})
    job(2, {two / name: case | {"sharded": True} for name, case in CASES.items()})
    for name in CASES:
        same(one / name, two / name, 2, *([1e-6] if "dtype" in CASES[name] else []))
    # Whichever kind wrote a checkpoint, either kind goes on from it to the same weights.
    mine, theirs = ({"resume": str(x / "everything/checkpoints")} | CASES["everything"] for x in (one, two))
    job(1, {one / "again": mine | {"sharded": False}, one / "crossed": theirs | {"sharded": False}})
    job(2, {two / "crossed": mine | {"sharded": True}})
    same(one / "again", two / "crossed", 4)
    same(one / "again", one / "crossed", 4, 1e-9)
    assert difference(*(one / x / "snapshots/v0.safetensors" for x in ("again", "everything"))) > 1e-3
