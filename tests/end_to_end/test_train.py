"""`rlkit train` whole: resume bit for bit, kills, signals, bad input."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from safetensors.torch import load_file
from tiny import TINY
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlkit.cli import main
from rlkit.telemetry.rollouts import read_rollouts

pytestmark = pytest.mark.slow


def settings(folder: Path, name: str, *more: str) -> list[str]:
    places = [f"output_dir={folder}", f"sft.cache_dir={folder}/cache", f"name={name}"]
    return [*TINY, *places, *more]


def metrics(run: Path) -> list[dict[str, float]]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    timed = ("time/", "perf/")
    return [{k: v for k, v in row.items() if not k.startswith(timed) and k not in ("time", "seconds")} for row in rows]


def trained(run: Path) -> list[int]:
    query = "SELECT ordinal FROM groups WHERE state = 'trained' ORDER BY trained_step, ordinal"
    with contextlib.closing(sqlite3.connect(run / "buffer.db")) as connection:
        return [ordinal for (ordinal,) in connection.execute(query)]


def test_resume_is_bit_for_bit(tmp_path, capsys):
    assert main(["train", *settings(tmp_path, "whole", "steps=20")]) == 0
    assert main(["train", *settings(tmp_path, "parts", "steps=10")]) == 0
    assert main(["train", *settings(tmp_path, "parts", "steps=20")]) == 0
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    for step in range(1, 21):
        a, b = read_rollouts(whole, step), read_rollouts(parts, step)
        keys = ("ordinal", "index", "prompt_id", "token_ids", "behavior_logprobs", "advantage")
        assert [[r[k] for k in keys] for r in a] == [[r[k] for k in keys] for r in b]
    weights = [load_file(r / "checkpoints/step_20/model.safetensors") for r in (whole, parts)]
    assert weights[0].keys() == weights[1].keys()
    assert all(bool((weights[0][k] == weights[1][k]).all()) for k in weights[0])
    steps_a = [row for row in metrics(whole) if "reward/mean" in row]
    steps_b = [row for row in metrics(parts) if "reward/mean" in row]
    assert steps_a == steps_b
    assert trained(whole) == trained(parts) == list(range(80))


def start(arguments: list[str]) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-m", "rlkit", "train", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


def wait_for(path: Path, process: subprocess.Popen[bytes], deadline_s: float = 120) -> None:
    end = time.monotonic() + deadline_s
    while not path.exists():
        assert process.poll() is None, process.stdout.read().decode()
        assert time.monotonic() < end, f"{path} did not appear"
        time.sleep(0.05)


def assert_no_children(pids: list[int]) -> None:
    end = time.monotonic() + 10
    while any(psutil.pid_exists(pid) for pid in pids):
        assert time.monotonic() < end, f"left behind: {pids}"
        time.sleep(0.1)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_ended_at_a_random_moment_every_ordinal_is_trained_once(tmp_path, number):
    arguments = settings(tmp_path, "run", "steps=30", "checkpoint.every_steps=4")
    process = start(arguments)
    run = tmp_path / "run"
    try:
        wait_for(run / "rollouts" / "step_5.parquet", process)
        time.sleep(random.random())
        children = [c.pid for c in psutil.Process(process.pid).children(recursive=True)]
        process.send_signal(number)
        output, _ = process.communicate(timeout=60)
    finally:
        process.kill()
        process.wait()
    assert_no_children(children)
    if number != signal.SIGKILL:
        assert process.returncode == 128 + number, output.decode()
        assert "goes on from the checkpoint" in output.decode()
    assert main(["train", *arguments]) == 0
    assert trained(run) == list(range(120))
    rows = [row["step"] for row in metrics(run) if "reward/mean" in row]
    assert rows == list(range(1, 31))


BAD = [
    (["learner.learning_rat=1"], "learning_rate"),
    (["samples_per_prompt=1"], "samples_per_prompt"),
    (["data.train.max_prompt_tokens=1"], "max_prompt_tokens"),
    (["reward.rewards.correct.weight=nan"], "weight"),
    (["data.train.chat=true"], "chat template"),
    (["output_dir=/proc/nowhere"], "output_dir"),
]


@pytest.mark.parametrize(("overrides", "named"), BAD)
def test_bad_input_ends_before_training_and_names_the_key(tmp_path, capsys, overrides, named):
    assert main(["train", *settings(tmp_path, "bad", "steps=1"), *overrides]) == 2
    assert named in capsys.readouterr().err
    assert not list(tmp_path.glob("**/rollouts/*"))


def test_corrupt_checkpoint_is_named(tmp_path, capsys):
    assert main(["train", *settings(tmp_path, "run", "steps=2")]) == 0
    file = tmp_path / "run/checkpoints/step_2/model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    assert main(["train", *settings(tmp_path, "run", "steps=3")]) == 2
    assert "model.safetensors is corrupt" in capsys.readouterr().err


def test_missing_answer_and_empty_file(tmp_path, capsys):
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"question": "1+1", "answer": "2"}\n{"question": "1+2", "answer": null}\n')
    plain = ['data.train.prompt="{question}"', "data.train.max_prompt_tokens=16", "sft=null"]
    arguments = settings(tmp_path, "bad", "steps=1", f"data.train.path={rows}", *plain)
    assert main(["train", *[a for a in arguments if not a.startswith("sft.")]]) == 2
    assert "no reference answer" in capsys.readouterr().err
    rows.write_text("")
    assert main(["train", *[a for a in arguments if not a.startswith("sft.")]]) == 2
    assert "empty" in capsys.readouterr().err or "no rows" in capsys.readouterr().err


def test_parity_check_passes_on_the_tiny_model(tmp_path, capsys):
    assert main(["check-parity", *settings(tmp_path, "parity")]) == 0
    out = capsys.readouterr().out
    assert "in parity" in out


def test_evaluating_a_checkpoint_gives_the_figures_of_the_run_and_it_loads_anywhere(tmp_path, capsys):
    arguments = settings(tmp_path, "run", "steps=2")
    assert main(["train", *arguments]) == 0
    during = {k: v for k, v in metrics(tmp_path / "run")[-1].items() if k.startswith("eval/")}
    checkpoint = tmp_path / "run/checkpoints/step_2"
    capsys.readouterr()
    assert main(["eval", *arguments, "--checkpoint", str(checkpoint)]) == 0
    assert json.loads(capsys.readouterr().out) == during
    own = "evaluation.engine={_target_: rlkit.rollout.transformers_engine.TransformersEngine}"
    elsewhere = [*arguments, "rollout=vllm", own]  # a run on servers is evaluated without them
    assert main(["eval", *elsewhere, "--checkpoint", str(checkpoint)]) == 0
    assert json.loads(capsys.readouterr().out) == during
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    saved = load_file(checkpoint / "model.safetensors")
    assert all(bool((model.state_dict()[k] == v).all()) for k, v in saved.items())
    assert tokenizer.decode(tokenizer("1+2=").input_ids, skip_special_tokens=True) == "1+2="
    assert main(["eval", *arguments, "--checkpoint", str(tmp_path / "nowhere")]) == 2
    assert "no such checkpoint" in capsys.readouterr().err


def test_two_ranks_train_as_one(tmp_path):
    """Small batches, so that the second rank has steps without a micro-batch of its own."""
    assert main(["train", *settings(tmp_path, "one", "steps=3")]) == 0
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "rlkit", "train"]
    command = [sys.executable, *launch, *settings(tmp_path, "two", "steps=3", "learner.device=cpu")]
    done = subprocess.run(command, capture_output=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr.decode()
    one, two = metrics(tmp_path / "one"), metrics(tmp_path / "two")
    assert [row.keys() for row in one] == [row.keys() for row in two]
    for a, b in zip(one, two, strict=True):
        assert a == pytest.approx(b, rel=1e-4, abs=1e-5)


FAILING = """
import os
from rlkit.algorithms.losses.clipped import ClippedLoss

class Failing(ClippedLoss):
    def __call__(self, inputs):
        if os.environ["RANK"] == "0":
            raise ZeroDivisionError("on one rank only")
        return super().__call__(inputs)
"""


def test_a_step_that_fails_on_rank_0_alone_ends_all_ranks_with_its_message(tmp_path):
    (tmp_path / "failing.py").write_text(FAILING)
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "rlkit", "train"]
    changes = ["learner.device=cpu", "algorithm.loss={_target_: failing.Failing}"]
    command = [sys.executable, *launch, *settings(tmp_path, "run", *changes)]
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", os.getcwd())])}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode != 0
    assert "raised ZeroDivisionError: on one rank only" in done.stderr


def test_a_users_reward_that_answers_nan_ends_the_run_with_its_name(tmp_path, capsys, monkeypatch):
    (tmp_path / "mine.py").write_text("def half(sample, value):\n    return float(value)\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    good = settings(tmp_path, "good", "steps=1", "+reward.rewards.mine={_target_: mine.half, value: 0.5}")
    assert main(["train", *good]) == 0
    assert metrics(tmp_path / "good")[1]["reward/mine/mean"] == 0.5
    bad = settings(tmp_path, "bad", "steps=1", "+reward.rewards.mine={_target_: mine.half, value: 'nan'}")
    assert main(["train", *bad]) == 2
    assert "NaN from reward 'mine'" in capsys.readouterr().err
    assert not list(tmp_path.glob("bad/rollouts/*"))


def test_dynamic_sampling_replaces_dead_groups_and_resumes(tmp_path):
    """DAPO, arXiv 2503.14476, section 3.2: every group of a step has unequal scores."""
    arguments = settings(tmp_path, "run", "algorithm=dapo", "algorithm.max_filter_draws=50", "checkpoint.every_steps=2")
    assert main(["train", *arguments, "steps=2"]) == 0
    assert main(["train", *arguments, "steps=4"]) == 0
    assert main(["train", *settings(tmp_path, "whole", *arguments[-2:], "algorithm=dapo", "steps=4")]) == 0
    run = tmp_path / "run"
    rows = [row for row in metrics(run) if "reward/mean" in row]
    assert [row["group/dead_frac"] for row in rows] == [0.0] * 4
    assert all(row["group/filtered_frac"] > 0 and row["off_policy/dropped"] > 0 for row in rows)
    ordinals = trained(run)
    assert len(ordinals) == 16 and ordinals == sorted(set(ordinals)) and ordinals[-1] > 15
    assert ordinals == trained(tmp_path / "whole")
    assert rows == [row for row in metrics(tmp_path / "whole") if "reward/mean" in row]


@pytest.mark.parametrize("loss", ["real", "real_bce", "real_product"])
def test_losses_over_whole_groups_train_with_several_updates_a_step(tmp_path, loss):
    """REAL, arXiv 2602.05630: every group has both labels; in the second update scores have left 0."""
    arguments = [f"algorithm={loss}", "algorithm/group_filter=mixed_scores", "algorithm.max_filter_draws=50"]
    arguments += ["old_policy=recompute", "learner.updates_per_step=2", "steps=2"]
    assert main(["train", *settings(tmp_path, "run", *arguments)]) == 0
    rows = [row for row in metrics(tmp_path / "run") if "reward/mean" in row]
    bound = 1 / 0.5 / (4 if loss == "real_bce" else 1)
    assert all(0 < row["policy/sequence_slope/max"] <= bound for row in rows)
    assert all(row["policy/loss"] > 0 and row["policy/grad_norm"] > 0 and row["policy/kl_old"] > 0 for row in rows)
    assert not [name for row in rows for name in row if "clip_frac" in name]


def test_a_run_that_left_no_checkpoint_leaves_nothing_to_the_next(tmp_path):
    process = start(settings(tmp_path, "run", "steps=50", "checkpoint.every_steps=50"))
    run = tmp_path / "run"
    try:
        wait_for(run / "rollouts" / "step_4.parquet", process)
    finally:
        process.kill()
        process.wait()
    assert main(["train", *settings(tmp_path, "run", "steps=2", "seed=7")]) == 0
    assert [row["step"] for row in metrics(run)] == [0, 1, 2, 2, 2]  # step 2, its checkpoint, its evaluation
    assert sorted(p.name for p in (run / "rollouts").iterdir()) == ["step_1.parquet", "step_2.parquet"]
    summary = json.loads((run / "summary.json").read_text())
    assert (summary["seed"], summary["steps"], summary["avg@4_after_step"]) == (7, 2, 2)


def test_what_a_run_is_judged_by_and_trained_on_does_not_change_on_resume(tmp_path, capsys):
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"question": "1+1=", "answer": "2"}\n{"question": "1+2=", "answer": "3"}\n')
    data = [f"data.train.path={rows}", 'data.train.prompt="{question}"', 'data.train.reference="{answer}"']
    data += ["reward.rewards={exact: {_target_: rewards.exact.ExactMatch, extract: whole}}", "sft=null"]
    base = [a for a in settings(tmp_path, "run") if not a.startswith("sft.")] + data
    assert main(["train", *base, "steps=1"]) == 0
    assert "maj@4" in json.dumps(metrics(tmp_path / "run"))
    assert main(["train", *base, "steps=2", "evaluation.correct_at=0.5"]) == 2
    assert "evaluation.correct_at" in capsys.readouterr().err
    rows.write_text(rows.read_text().replace("1+1=", "2+0="))
    assert main(["train", *base, "steps=2"]) == 2
    assert "trained on other rows of data.train" in capsys.readouterr().err


def test_a_reward_without_answers_has_no_majority_score(tmp_path, monkeypatch):
    (tmp_path / "simple.py").write_text("def one(sample):\n    return 1.0\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    only = ["reward.rewards={one: {_target_: simple.one}}", "~reward.rewards.correct"]
    assert main(["train", *settings(tmp_path, "run", "steps=1"), *only]) == 0
    names = {name for row in metrics(tmp_path / "run") for name in row}
    assert "eval/heldout/avg@4" in names and not any("maj@" in name for name in names)


def test_a_plug_in_that_exits_at_import_is_named(tmp_path, capsys, monkeypatch):
    (tmp_path / "leaves.py").write_text("import sys\n\n\ndef one(sample):\n    return 1.0\n\n\nsys.exit(0)\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert main(["train", *settings(tmp_path, "run"), "reward.rewards={one: {_target_: leaves.one}}"]) == 2
    assert "leaves" in capsys.readouterr().err


def test_a_reward_whose_constructor_exits_is_named(tmp_path, capsys, monkeypatch):
    body = "class One:\n    def __init__(self):\n        raise SystemExit(0)\n"
    (tmp_path / "quits.py").write_text(body)
    monkeypatch.syspath_prepend(str(tmp_path))
    assert main(["train", *settings(tmp_path, "run"), "reward.rewards={one: {_target_: quits.One}}"]) == 2
    assert "quits.One" in capsys.readouterr().err
