"""Damaged and half-written files, and full disks: named, never used, and mended where the rest suffices."""

from __future__ import annotations

import contextlib
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from runs import metrics, rows, running, settings, step, trained, until

from rlkit.cli import main
from rlkit.learner import checkpoint as checkpoints

pytestmark = pytest.mark.slow


def flip(path: Path) -> None:
    """One bit in the middle."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def test_damaged_payloads_are_found_on_resume_and_sampled_again(tmp_path, capsys, monkeypatch):
    """The power fails before the first checkpoint: what was sampled by the first weights is still good."""
    arguments = settings(tmp_path, "run", "checkpoint.every_steps=3")

    def power_cut(*_: object, **__: object) -> None:
        raise KeyError("power cut")

    assert main(["sft", *arguments]) == 0
    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "save", power_cut)
        with pytest.raises(KeyError, match="power cut"):
            main(["train", *arguments, "steps=6"])
    payloads = tmp_path / "run" / "payloads"
    for number, damage in enumerate((flip, cut, Path.unlink)):
        damage(next(payloads.glob(f"{number}-*")))
    capsys.readouterr()
    assert main(["train", *arguments, "steps=6"]) == 0
    assert "buffer: 1 groups go on, 3 are sampled again, damaged on disk: 0, 1, 2" in capsys.readouterr().out
    assert main(["train", *settings(tmp_path, "whole", "steps=6")]) == 0
    assert trained(tmp_path / "run") == trained(tmp_path / "whole") == list(range(24))
    assert [r for r in metrics(tmp_path / "run") if "reward/mean" in r] == [
        r for r in metrics(tmp_path / "whole") if "reward/mean" in r
    ]


def test_a_changed_recipe_trains_on_nothing_that_the_old_one_sampled(tmp_path, capsys, monkeypatch):
    """Same name, no checkpoint: other weights are version 0 now, and other prompts are the first ordinals."""
    arguments = settings(tmp_path, "run", "steps=1")
    assert main(["sft", *arguments]) == 0
    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "save", lambda *_, **__: cut(tmp_path / "nowhere"))
        with pytest.raises(FileNotFoundError):
            main(["train", *arguments])
    assert len(trained(tmp_path / "run")) == 4
    assert main(["train", *arguments, "seed=5"]) == 0
    assert "groups go on" not in capsys.readouterr().out
    (first,) = [row for row in metrics(tmp_path / "run") if "reward/mean" in row]
    assert first["mismatch/logprob_absdiff/max"] < 1e-4


def test_a_changed_recipe_is_refused_once_and_before_anything_starts(tmp_path, capsys):
    assert main(["train", *settings(tmp_path, "run", "steps=1")]) == 0
    capsys.readouterr()
    changed = [*settings(tmp_path, "run", "steps=2", "rollout.workers=1"), "prompts_per_step=2"]
    assert main(["train", *changed]) == 2
    shown = "".join(capsys.readouterr())
    assert shown.count("holds a run with prompts_per_step = 4") == 1 and "Traceback" not in shown
    assert not (tmp_path / "run" / "logs" / "learner.log").exists()


def test_a_database_with_another_run_of_this_name_is_left_alone(tmp_path, capsys):
    """A database holds many runs; this one's folder is somewhere else, or on another machine."""
    shared = ["steps=1", f"buffer.url=sqlite:///{tmp_path}/buffer.db"]
    assert main(["train", *settings(tmp_path, "run", *shared)]) == 0
    elsewhere = [*settings(tmp_path, "run", *shared), f"output_dir={tmp_path}/elsewhere"]
    assert main(["train", *elsewhere]) == 2
    assert "holds a run of this name, at step 1" in capsys.readouterr().err
    assert trained(tmp_path) == list(range(4))
    assert main(["train", *elsewhere, "resume=never"]) == 0


def test_half_written_checkpoints_are_removed_or_named(tmp_path, capsys):
    assert main(["train", *settings(tmp_path, "run", "steps=2")]) == 0
    folder = tmp_path / "run" / "checkpoints"
    shutil.copytree(folder / "step_2", folder / ".step_3.tmp")  # of a killed learner
    cut(folder / ".step_3.tmp" / "model.safetensors")
    assert main(["train", *settings(tmp_path, "run", "steps=4")]) == 0
    assert sorted(x.name for x in folder.iterdir()) == ["step_2", "step_4"]
    shutil.copytree(folder / "step_4", folder / "step_5")  # of a broken file system
    (folder / "step_5" / checkpoints.MANIFEST).unlink()
    capsys.readouterr()
    assert main(["train", *settings(tmp_path, "run", "steps=6")]) == 2
    assert f"delete {folder / 'step_5'} to go on from {folder / 'step_4'}" in capsys.readouterr().err
    shutil.rmtree(folder / "step_5")
    assert main(["train", *settings(tmp_path, "run", "steps=6")]) == 0
    assert trained(tmp_path / "run") == list(range(24))


def test_a_worker_refuses_damaged_weights(tmp_path, capsys):
    arguments = settings(tmp_path, "run", "steps=1", "rollout.workers=1")
    run = tmp_path / "run"
    file = run / "snapshots" / "v0.safetensors"
    with running("learner", arguments) as learner:
        until(lambda: rows(run, "SELECT 1 FROM versions WHERE checksum IS NOT NULL"), learner.text)
        until(lambda: rows(run, "SELECT 1 FROM groups"), learner.text)
        good = file.read_bytes()
        for damage in (flip, cut, Path.unlink):
            damage(file)
            capsys.readouterr()
            assert main(["worker", *arguments]) == 1
            assert str(file) in capsys.readouterr().err
            file.write_bytes(good)
        assert not rows(run, "SELECT 1 FROM slices WHERE epoch > 0")  # not even leased
        with running("worker", arguments) as worker:
            until(lambda: step(run) == 1)
            worker.process.terminate()
        learner.process.terminate()
    assert trained(run) == [0, 1, 2, 3]


@contextlib.contextmanager
def disk(folder: Path, megabytes: int) -> Iterator[None]:
    """A file system of its own; skips where none can be mounted."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "none", str(folder)]
    try:
        made = subprocess.run(command, capture_output=True, timeout=20, check=False)
    except FileNotFoundError:
        pytest.skip("no mount command")
    if made.returncode:
        pytest.skip(f"mounting is not allowed here: {made.stderr.decode().strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(folder)], timeout=20, check=True)


@pytest.mark.parametrize("kilobytes", [40, 200, 3000, 9000, 17000])
def test_a_run_on_a_full_disk_says_so_and_goes_on_once_there_is_room(tmp_path, capsys, kilobytes):
    """Room for not even a database, for no weights, for half a checkpoint, for one, and for two but not three."""
    arguments = settings(tmp_path / "disk", "run", "steps=6", "checkpoint.every_steps=2", "checkpoint.keep=3")
    arguments += [f"sft.cache_dir={tmp_path}/cache"]
    assert main(["sft", *arguments]) == 0
    with disk(tmp_path / "disk", 64):
        ballast = tmp_path / "disk" / "ballast"
        ballast.write_bytes(bytes((65536 - kilobytes) * 1024))
        capsys.readouterr()
        assert main(["train", *arguments]) in (1, 2)
        said = capsys.readouterr().err
        assert "No space left" in said or "full disk" in said, said
        ballast.unlink()
        assert main(["train", *arguments]) == 0
        assert trained(tmp_path / "disk" / "run") == list(range(24))
        assert [r["step"] for r in metrics(tmp_path / "disk" / "run") if "reward/mean" in r] == [1, 2, 3, 4, 5, 6]


def test_a_run_with_workers_on_a_full_disk_ends_with_a_message_and_goes_on_once_there_is_room(tmp_path):
    arguments = settings(tmp_path / "disk", "run", "steps=6", "rollout.workers=1", f"sft.cache_dir={tmp_path}/cache")
    run = tmp_path / "disk" / "run"
    assert main(["sft", *arguments]) == 0
    with disk(tmp_path / "disk", 11):  # two snapshots and half a checkpoint
        with running("train", arguments) as first:
            assert first.ended() == 2, first.text()
            assert "No space left on device" in first.text() and "Traceback" not in first.text(), first.text()
            assert step(run) > 0
        subprocess.run(["mount", "-o", "remount,size=64m", str(tmp_path / "disk")], timeout=20, check=True)
        with running("train", arguments) as second:
            assert second.ended() == 0, second.text()
        assert trained(run) == list(range(24))
