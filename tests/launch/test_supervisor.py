"""The supervisor with real processes: clean ends, crashes, silence, signals; nothing is left behind."""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from rlkit.launch.supervisor import Part, PartFailed, Supervisor

SILENCE_S = 4.0
FOLLOW = f"""
import os, signal, sys, time
from pathlib import Path
from rlkit.launch.supervisor import follow
follow({SILENCE_S})
lives = Path("lives")
"""


def part(name: str, code: str, *, vital: bool = False) -> Part:
    return Part(name=name, command=[sys.executable, "-c", FOLLOW + textwrap.dedent(code)], vital=vital)


def worker(code: str) -> Part:
    """Counts its lives in a file, then runs the code."""
    return part("worker", f"lives.open('a').write('x')\n{code}\ntime.sleep(60)")


def learner(worker_lives: int) -> Part:
    """The vital part, which waits for that many lives of the worker."""
    return part(
        "learner",
        f"while not (lives.exists() and lives.read_text() == {'x' * worker_lives!r}): time.sleep(.01)",
        vital=True,
    )


def wait_until(holds: Callable[[], object], seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.fixture(autouse=True)
def nothing_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    before = set(psutil.Process().children(recursive=True))  # of other tests' fixtures
    yield
    wait_until(lambda: not set(psutil.Process().children(recursive=True)) - before)


def test_the_vital_parts_end_ends_the_others(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert asyncio.run(Supervisor(tmp_path).run([learner(1), worker("print('at work', flush=True)")])) == 0
    assert "    worker | at work" in capfd.readouterr().out
    assert "at work" in (tmp_path / "logs" / "worker.log").read_text()


def test_a_part_that_crashes_is_started_again_and_counted(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    dead: list[int] = []
    it = Supervisor(tmp_path, crashed=lambda pid: dead.append(pid) or "its leases are given back")
    assert asyncio.run(it.run([learner(3), worker("lives.read_text() == 'xxx' or os._exit(7)")])) == 0
    assert it.restarts() == {"learner": 0, "worker": 2} and len(set(dead)) == 2
    assert "supervisor | its leases are given back" in capfd.readouterr().out
    assert json.loads((tmp_path / "supervisor.json").read_text()) == it.restarts()


@pytest.mark.parametrize(("code", "most", "says"), [("1 / 0", 1, "2 times"), ("sys.exit(2)", 5, "status 2, 1 times")])
def test_a_crash_loop_or_wrong_input_ends_the_run(tmp_path: Path, code: str, most: int, says: str) -> None:
    waits = "signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))\ntime.sleep(60)"
    ends = f"print('last words', flush=True)\ntime.sleep(1)\n{code}"  # when the other one has been heard
    parts = [part("learner", waits, vital=True), worker(ends)]
    with pytest.raises(PartFailed, match=f"(?s)worker ended with.*{says}.*buffer: full") as error:
        asyncio.run(Supervisor(tmp_path, most_crashes=most, report=lambda: "buffer: full").run(parts))
    assert "ZeroDivisionError" in str(error.value) or "last words" in str(error.value)
    # Wrong input has nothing to do with what the others are at: no stacks of theirs around the message.
    stacks = "most recent call first" in (tmp_path / "logs" / "learner.log").read_text()
    assert stacks == (code == "1 / 0")


def test_a_stopped_part_is_named_killed_and_started_again(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """SIGSTOP, as a debugger or a full machine would: its second life lets the vital part end."""
    stops = worker("lives.read_text() == 'x' and (time.sleep(1), os.kill(os.getpid(), signal.SIGSTOP))")
    assert asyncio.run(Supervisor(tmp_path, silence_s=SILENCE_S).run([learner(2), stops])) == 0
    out = capfd.readouterr().out
    assert f"worker was silent for {SILENCE_S:.0f} s and is killed" in out and "stopped, heard" in out


SUPERVISED = f"""
import asyncio, sys
from pathlib import Path
from rlkit.launch.supervisor import Part, Supervisor
code = {FOLLOW!r} + "Path('pid').write_text(str(os.getpid())); time.sleep(60)"
learner = Part(name="learner", command=[sys.executable, "-c", code], vital=True)
sys.exit(asyncio.run(Supervisor(Path(".")).run([learner])))
"""


def test_a_console_that_is_gone_ends_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`rlkit train | head`, or a terminal that was closed."""

    def broken(*_: object, **__: object) -> None:
        raise BrokenPipeError

    monkeypatch.setattr("builtins.print", broken)
    crashes = worker("if lives.stat().st_size < 2: sys.exit(1)")
    assert asyncio.run(Supervisor(tmp_path).run([crashes, learner(2)])) == 0


def test_a_part_that_takes_its_time_to_end_hears_one_signal(tmp_path: Path) -> None:
    """A second one would have it leave at once, in the middle of its checkpoint."""
    slow = """
        signal.signal(signal.SIGTERM, lambda *_: lives.open("a").write("t"))
        lives.touch()
        signal.pause()
        time.sleep(2.5)
    """
    started = part("learner", "while not lives.exists(): time.sleep(.01)", vital=True)
    assert asyncio.run(Supervisor(tmp_path).run([part("worker", slow), started])) == 0
    assert (tmp_path / "lives").read_text() == "t"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL, signal.SIGSTOP])
def test_no_part_outlives_its_supervisor(tmp_path: Path, number: signal.Signals) -> None:
    """Killed or stopped, too: the part hears nothing, says so and ends itself."""
    process = subprocess.Popen([sys.executable, "-c", SUPERVISED], cwd=tmp_path)
    try:
        wait_until(lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text())
        own = psutil.Process(int((tmp_path / "pid").read_text()))
        time.sleep(1)  # it has been heard
        process.send_signal(number)
        wait_until(lambda: not own.is_running() or own.status() == psutil.STATUS_ZOMBIE)
        if number in (signal.SIGTERM, signal.SIGINT):
            assert process.wait(20) == 128 + number
        else:
            how = "is gone" if number == signal.SIGKILL else f"was silent for {SILENCE_S:.0f} s"
            assert f"{how}: this process ends" in (tmp_path / "logs" / "learner.log").read_text()
    finally:
        process.kill()
        process.wait(20)


def test_several_ranks_are_started_without_a_gpu() -> None:
    command = [sys.executable, "-m", "rlkit.launch.ranks", "2", "--version"]
    assert subprocess.check_output(command, text=True, timeout=100).count("rlkit ") == 2
