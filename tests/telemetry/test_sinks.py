"""Telemetry fans out and always closes; the console and wandb show what they should."""

import io
import json
import os
import shutil
import struct
import subprocess
import sys
import time
import types
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from rlkit.config.schema import TelemetryConfig
from rlkit.telemetry import sinks
from rlkit.telemetry.names import Metrics, TelemetryError
from rlkit.telemetry.record import RunRecord, read_metrics
from rlkit.telemetry.report import write_summary
from rlkit.telemetry.rollouts import judged_rollouts
from rlkit.telemetry.sinks import ConsoleSink, JsonlSink, Telemetry, WandbSink, duration

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
    """Everything a run folder holds, logged offline in this process; the service process must be gone afterwards."""
    run = RunRecord(run_dir)
    telemetry = TelemetryConfig(wandb="offline", aliases="trl")
    sink = WandbSink(run_dir, telemetry, name="n", config=run.config, started=time.monotonic() - 500)
    assert any("wandb" in name for name in children())
    sink.log(1, {"sft/loss": 0.5})
    for row in run.rows:
        sink.log(row.step, row.metrics)
    sink.close()
    sink.close()
    assert not any("wandb" in name for name in children())


def read_wandb(log: Path) -> dict[str, list[Any]]:
    """Records of a .wandb file by kind: 7 bytes of header, then LevelDB's log format around wandb's own messages."""
    from wandb.proto import wandb_internal_pb2

    data, at, message = log.read_bytes(), 7, b""
    records: dict[str, list[Any]] = {}
    while at + 7 <= len(data):
        left = 32768 - at % 32768
        if left < 7:  # padding at the end of a block
            at += left
            continue
        _, length, kind = struct.unpack("<IHB", data[at : at + 7])
        message += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # a whole record, or the last piece of one
            record = wandb_internal_pb2.Record.FromString(message)
            records.setdefault(record.WhichOneof("record_type"), []).append(record)
            message = b""
    return records


def items(pairs: Any) -> dict[str, Any]:
    """Key and value of wandb's messages."""
    return {pair.key or "/".join(pair.nested_key): json.loads(pair.value_json) for pair in pairs}


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_wandb_offline_has_what_users_expect_without_account_and_network(tmp_path: Path, make_run) -> None:
    pytest.importorskip("wandb")
    home, run_dir = tmp_path / "home", make_run(steps=4, eval_steps=(0, 4))
    home.mkdir()
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
    assert not (tmp_path / "wandb").exists()
    log = max((run_dir / "wandb").glob(f"offline-run-*-{ids[0]}/run-{ids[0]}.wandb"))
    records = read_wandb(log)
    assert len(records["exit"]) == 1

    config = items(records["run"][0].run.config.update)
    assert config["seed"] == 7 and config["model"]["architecture"]["hidden_size"] == 128
    assert config["buffer"]["url"] == "postgresql://***@db/run"  # without its login
    axes = {m.metric.name or m.metric.glob_name: m.metric.step_metric for m in records["metric"]}
    assert axes == {
        "run/seconds": "", "learner/step": "run/seconds", "*": "learner/step",
        "sft/step": "run/seconds", "sft/*": "sft/step",
    }  # fmt: skip
    history = [items(record.history.item) for record in records["history"]]
    assert [row["learner/step"] for row in history[1:]] == [0, 1, 2, 3, 4, 4]
    assert history[0]["sft/step"] == 1 and all(500 <= row["run/seconds"] < 600 for row in history)
    trained = [row for row in history if "reward/mean" in row]
    assert len(trained) == 4 and all(row["train/reward"] == row["reward/mean"] for row in trained)

    summary: dict[str, Any] = {}
    for record in records["summary"]:
        summary |= items(record.summary.update)
    figures = write_summary(run_dir)["eval"]
    assert figures["held_out"]["avg@4_after"] == pytest.approx(0.76)
    for name, value in figures["held_out"].items():
        assert summary[f"eval/held_out/{name}"] == value
    assert summary["reward/mean"] == trained[-1]["reward/mean"]

    # one table, with the last evaluation: there are no rollouts of step 0
    assert ["completions/path" in row for row in history] == [False] * 6 + [True]
    table = json.loads((log.parent / "files" / history[-1]["completions/path"]).read_text())
    rows = [dict(zip(table["columns"], row, strict=True)) for row in table["data"]]
    kept = judged_rollouts(run_dir, 4, {})
    assert len(rows) == 3 * sinks.TABLE_ROWS and {row["verdict"] for row in rows} == {"right", "wrong", "unscored"}
    assert all(row in [{key: one[key] for key in sinks.TABLE} for one in kept] for row in rows)
    assert {row["step"] for row in rows} == {4} and all(row["reference"] and row["prompt"] for row in rows)


def test_a_table_is_due_every_so_many_steps_and_once_a_step(make_run) -> None:
    """Without wandb: what is handed to the run, through a stand-in for the library."""
    run_dir, rows = make_run(steps=4), []
    library = types.SimpleNamespace(Table=lambda columns, data: {"rows": len(data)})
    sink = WandbSink.__new__(WandbSink)
    sink._wandb, sink._run_dir, sink._config, sink._started = library, run_dir, {}, 0.0
    sink._run, sink._tabled = types.SimpleNamespace(log=rows.append), 0
    sink._telemetry = TelemetryConfig(completions_every_steps=2)
    for step in range(5):  # rollouts of steps 1 and 4 were kept
        sink.log(step, {"reward/mean": 0.5})
    sink.log(4, {"eval/held_out/avg@4": 0.5})
    assert ["completions" in row for row in rows] == [False, False, False, False, True, False]


@pytest.mark.parametrize("key", ["wandb", "tensorboard"])
def test_a_missing_library_says_how_to_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str) -> None:
    def missing(name: str) -> object:
        raise ImportError(name)

    monkeypatch.setattr(sinks.importlib, "import_module", missing)
    config = TelemetryConfig(console=False, **{key: "online" if key == "wandb" else True})
    with pytest.raises(TelemetryError, match=rf"rlkit-rlvr\[{key}\].*telemetry\.{key}="):
        Telemetry.open(config, tmp_path, name="n", total_steps=1, config={})


def test_optional_libraries_are_not_imported_unless_asked_for() -> None:
    code = "import sys, rlkit.telemetry.sinks; sys.exit('wandb' in sys.modules or 'tensorboard' in sys.modules)"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    assert subprocess.run([sys.executable, "-c", code], env=environment, timeout=60).returncode == 0


def test_tensorboard_reads_back_what_was_logged_and_a_resumed_run_replaces_what_it_lost(tmp_path: Path) -> None:
    accumulators = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    config = TelemetryConfig(console=False, tensorboard=True, aliases="verl")
    arguments = {"name": "run", "total_steps": 5, "config": {}}
    with Telemetry.open(config, tmp_path, **arguments) as telemetry:
        for step in (1, 2, 3):
            telemetry.log(step, {"reward/mean": step / 4, "policy/loss": None})
    with Telemetry.open(config, tmp_path, resume_step=2, **arguments) as telemetry:
        telemetry.log(4, {"reward/mean": 0.875, "eval/held_out/avg@4": 0.5})
    found = accumulators.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    curves = {name: [(e.step, e.value) for e in found.Scalars(name)] for name in found.Tags()["scalars"]}
    rewards = [(1, 0.25), (2, 0.5), (4, 0.875)]
    assert curves == {
        "reward/mean": rewards, "critic/score/mean": rewards,
        "eval/held_out/avg@4": [(4, 0.5)], "val-core/held_out/reward/mean@4": [(4, 0.5)],
    }  # fmt: skip
    assert "critic/score/mean" not in (tmp_path / "metrics.jsonl").read_text()
