"""The command line: dispatch, exit status, messages."""

from __future__ import annotations

import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from rlkit import cli
from rlkit.errors import ConfigError


def run(*arguments: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    status = cli.main(list(arguments))
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_check_prints_all_and_starts_nothing(
    rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    before = set(tmp_path.rglob("*"))
    status, out, err = run("check", "recipe=gsm8k_smoke", f"data.train.path={rows}", "steps=7", capsys=capsys)
    assert (status, err) == (0, "")
    assert "steps: 7" in out and str(rows) in out
    assert "optimiser steps" in out and "weights" in out
    assert set(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["check", "recipe=quickstart", "stepz=3"], "Did you mean 'steps'?"),
        (["check", "recipe=quickstart", "samples_per_prompt=1"], "2 or more"),
        (["train", "recipe=quickstart", "samples_per_prompt=1"], "2 or more"),
        (["check", "steps=3"], "no such recipe"),
        (["check", "recipe=gsm8k", "recipe=quickstart"], "exactly one recipe"),
        (["check", "recipe="], "expected: one of deepscaler, "),
        (["check", "recipe=quickstart", "--config-dir", "nowhere"], "--config-dir"),
    ],
)
def test_bad_input_is_one_message_and_status_2(
    arguments: list[str], text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    status, out, err = run(*arguments, capsys=capsys)
    assert status == 2
    assert text in err and "Traceback" not in err
    assert out == ""


def test_overrides_around_options(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine.yaml").write_text("defaults: [quickstart, _self_]\nname: mine\n")
    seen: list[Any] = []
    _stand_in(monkeypatch, "rlkit.evaluation.evaluate", lambda *given: seen.append(given))
    status, _, _ = run(
        "eval", "seed=5", "--config-dir", str(tmp_path), "recipe=mine", "--checkpoint", "c",
        "~algorithm.loss.dual_clip", capsys=capsys,
    )  # fmt: skip
    ((config, raw, checkpoint),) = seen
    assert status == 0
    assert (config.name, config.seed, raw["seed"], checkpoint) == ("mine", 5, 5, Path("c"))
    assert "dual_clip" not in config.algorithm.loss


def _stand_in(monkeypatch: pytest.MonkeyPatch, module: str, main: Any) -> None:
    fake = types.ModuleType(module)
    fake.main = main  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module, fake)


@pytest.mark.parametrize(
    ("command", "module"),
    [("train", "rlkit.launch.run"), ("sft", "rlkit.learner.sft"), ("check-parity", "rlkit.learner.parity")],
)
def test_recipe_commands_pass_config_and_status(command: str, module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[Any, ...]] = []

    def main(*given: Any) -> int:
        seen.append(given)
        return 143

    _stand_in(monkeypatch, module, main)
    assert cli.main([command, "recipe=quickstart", "seed=3"]) == 143
    config, raw, *arguments = seen[0]
    assert config.seed == raw["seed"] == 3
    # What starts processes of its own hands its command line on to them.
    assert arguments == ([["recipe=quickstart", "seed=3"]] if command == "train" else [])


@pytest.mark.parametrize(
    ("command", "module"), [("report", "rlkit.telemetry.report"), ("buffer", "rlkit.buffer.inspect")]
)
def test_run_commands_pass_the_folder(command: str, module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Path] = []
    _stand_in(monkeypatch, module, seen.append)
    assert cli.main([command, "outputs/x"]) == 0
    assert seen == [Path("outputs/x")]
    with pytest.raises(SystemExit) as end:
        cli.main([command, "outputs/x", "more"])
    assert end.value.code == 2


def test_rollouts_has_its_own_options(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[str]] = []

    def main(arguments: list[str]) -> int:
        seen.append(arguments)
        return 0

    _stand_in(monkeypatch, "rlkit.telemetry.rollouts", main)
    assert cli.main(["rollouts", "outputs/x", "--step", "3"]) == 0
    assert seen == [["outputs/x", "--step", "3"]]


@pytest.mark.parametrize("arguments", [[], ["trian"], ["check", "recipe=quickstart", "--bogus"]])
def test_wrong_usage(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main(arguments)
    assert end.value.code == 2
    assert "usage: rlkit" in capsys.readouterr().err


def test_errors_that_are_not_the_inputs_keep_their_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def main(*given: Any) -> int:
        raise ZeroDivisionError

    _stand_in(monkeypatch, "rlkit.launch.run", main)
    with pytest.raises(ZeroDivisionError):
        cli.main(["train", "recipe=quickstart"])


def test_split_recipe() -> None:
    assert cli.split_recipe(["a=1", "recipe=x", "b=2"]) == ("x", ["a=1", "b=2"])
    with pytest.raises(ConfigError):
        cli.split_recipe(["recipe=x", "recipe=y"])


@pytest.mark.slow
def test_python_dash_m_from_another_folder(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "rlkit", "check", "recipe=quickstart", "stepz=1"],
        cwd=tmp_path,
        env={"PYTHONPATH": str(Path(cli.__file__).parents[1]), "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 2
    assert "Did you mean 'steps'?" in done.stderr and "Traceback" not in done.stderr
