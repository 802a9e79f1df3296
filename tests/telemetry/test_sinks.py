"""Telemetry fans out and always closes; the console and wandb show what they should."""

import io
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from rlkit.config.schema import TelemetryConfig
from rlkit.telemetry import sinks
from rlkit.telemetry.jsonl import JsonlSink, read_metrics
from rlkit.telemetry.names import Metrics, TelemetryError
from rlkit.telemetry.sinks import ConsoleSink, Telemetry, WandbSink, duration

ROOT = Path(__file__).parents[2]


class Recorder:
    def __init__(self, error: Exception | None = None) -> None:
        self.rows: list[tuple[int, dict[str, float | None]]] = []
        self.closed: list[bool] = []
        self.error = error

    def log(self, step: int, metrics: Metrics) -> None:
        self.rows.append((step, dict(metrics)))

    def close(self, *, failed: bool = False) -> None:
        self.closed.append(failed)
        if self.error is not None:
            raise self.error


def test_an_unknown_or_mixed_row_reaches_no_sink() -> None:
    sink = Recorder()
    telemetry = Telemetry([sink])
    with pytest.raises(TelemetryError, match="reward/maen"):
        telemetry.log(1, {"reward/mean": 0.5, "reward/maen": 0.5})
    with pytest.raises(TelemetryError, match="sft"):
        telemetry.log(1, {"reward/mean": 0.5, "sft/loss": 0.5})
    assert sink.rows == []


def test_all_sinks_are_closed_when_the_run_and_one_of_them_fail() -> None:
    first, broken, last = Recorder(), Recorder(OSError("disk full")), Recorder()
    with pytest.raises(OSError, match="disk full"), Telemetry([first, broken, last]):
        raise RuntimeError("training failed")
    assert first.closed == broken.closed == last.closed == [True]


def test_open_resumes_where_the_checkpoint_stands(tmp_path: Path) -> None:
    config = TelemetryConfig(console=False)
    arguments = {"name": "run", "total_steps": 4, "config": {}}
    with Telemetry.open(config, tmp_path, **arguments) as telemetry:
        for step in (1, 2, 3):
            telemetry.log(step, {"reward/mean": step / 10})
    with Telemetry.open(config, tmp_path, resume_step=2, **arguments) as telemetry:
        assert [type(sink) for sink in telemetry.sinks] == [JsonlSink]
        telemetry.log(3, {"reward/mean": 0.9})
    rows = read_metrics(tmp_path)
    assert [(row.step, row.metrics["reward/mean"]) for row in rows] == [(1, 0.1), (2, 0.2), (3, 0.9)]
    assert [row.seconds for row in rows] == sorted(row.seconds for row in rows)


def test_plain_lines_without_a_terminal() -> None:
    out = io.StringIO()
    sink = ConsoleSink(20, console=Console(file=out, width=40))
    for step in (1, 2):
        sink.log(step, {"reward/mean": 0.5, "group/dead_frac": 0.25, "policy/entropy": None})
    sink.log(2, {"eval/[bold]x/avg@4": 0.412, "eval/[bold]x/avg@4_se": 0.013})
    sink.log(3, {"sft/loss": 1.5})
    sink.close()
    lines = out.getvalue().splitlines()
    assert lines[0] == "step 1/20  reward 0.500  dead 25%  entropy not finite"
    assert lines[1].startswith("step 2/20  reward 0.500") and "ETA" in lines[1]
    assert lines[2] == "step 2  eval [bold]x  avg@4 0.412 +- 0.013"
    assert lines[3].startswith("sft step 3/20  loss 1.5000  ETA")
    assert len(lines) == 4 and "\x1b" not in out.getvalue()


def test_a_bar_on_a_terminal_that_leaves_the_cursor_visible() -> None:
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=100, color_system=None)
    sink = ConsoleSink(20, start_step=10, console=console)
    sink.log(11, {"reward/mean": 0.5})
    sink.close()
    sink.close()
    assert "11/20" in out.getvalue() and "step 11/20  reward 0.500" in out.getvalue()
    assert out.getvalue().count("\x1b[?25l") == out.getvalue().count("\x1b[?25h") == 1


@pytest.mark.parametrize(("seconds", "text"), [(0, "0 s"), (99, "99 s"), (100, "2 min"), (7260, "2 h 1 min")])
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def children() -> set[str]:
    """Command names of this process's children (Linux)."""
    path = Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children")
    if not path.exists():
        pytest.skip("needs /proc")
    found = set()
    for pid in path.read_text().split():
        comm = Path(f"/proc/{pid}/comm")
        found.add(comm.read_text().strip() if comm.exists() else "")
    return found


OFFLINE = """
import sys, pathlib
sys.path.insert(0, {root!r})
from tests.telemetry.test_sinks import run_offline
run_offline(pathlib.Path({run!r}))
"""


def run_offline(run_dir: Path) -> None:
    """A whole offline run in this process; its service process must be gone afterwards."""
    sink = WandbSink(run_dir, project="p", name="n", mode="offline", config={"seed": 1})
    assert any("wandb" in name for name in children())
    sink.log(1, {"reward/mean": 0.5, "policy/loss": None})
    sink.log(1, {"sft/loss": 0.5})
    sink.close()
    sink.close()
    assert not any("wandb" in name for name in children())


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_wandb_offline_needs_no_account_and_no_network(tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    home, run_dir = tmp_path / "home", tmp_path / "run"
    home.mkdir()
    run_dir.mkdir()
    code = OFFLINE.format(root=str(ROOT), run=str(run_dir))
    command = [sys.executable, "-c", code]
    unshare = shutil.which("unshare")
    if unshare and not subprocess.run([unshare, "-rn", "true"], capture_output=True).returncode:
        command = [unshare, "-rn", *command]  # a namespace without any network interface
    environment = {"PATH": os.environ["PATH"], "HOME": str(home)}
    ids = []
    for _ in range(2):  # the second is a resumed run: same id
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        ids.append((run_dir / "wandb" / "rlkit_run_id").read_text())
    assert ids[0] == ids[1]
    logs = list((run_dir / "wandb").glob(f"offline-run-*-{ids[0]}/run-{ids[0]}.wandb"))
    assert logs
    recorded = logs[0].read_bytes()
    assert b"reward/mean" in recorded and b"learner/step" in recorded and b"sft/step" in recorded
    assert not (tmp_path / "wandb").exists()


def test_wandb_missing_says_how_to_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = {"project": "p", "name": "n", "config": {}}

    def no_wandb(name: str) -> object:
        raise ImportError(name)

    monkeypatch.setattr(sinks.importlib, "import_module", no_wandb)
    with pytest.raises(TelemetryError, match=r"telemetry\.wandb=off"):
        WandbSink(tmp_path, mode="online", **arguments)
    config = TelemetryConfig(console=False, wandb="online")
    with pytest.raises(TelemetryError):
        Telemetry.open(config, tmp_path, name="n", total_steps=1, config={})


def test_wandb_is_not_imported_unless_asked_for() -> None:
    code = "import sys, rlkit.telemetry.sinks; sys.exit('wandb' in sys.modules)"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    assert subprocess.run([sys.executable, "-c", code], env=environment, timeout=60).returncode == 0
