"""The processes of a run on one machine: started, heard, started again, and ended together.

Supervisor and part hold the ends of a socket pair: the part sends a byte a second, the supervisor answers each. A part
that is silent for `silence_s` (stopped, or stuck in the interpreter) is named, killed and counts as crashed; a part
that gets no answer, or finds the other end closed, ends itself. Every part writes a log file of its own, which the
supervisor shows on the console line by line: one that is stopped or gone blocks nobody.

A part that crashes is started again after a pause that doubles; one that crashes more than `most_crashes` times within
`CRASH_WINDOW_S`, or says that its input is wrong (exit status 2), ends the run. The run is over when the vital part
is, or all are.
"""

import asyncio
import contextlib
import faulthandler
import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from rlkit.errors import RlkitError
from rlkit.telemetry.record import replace_file

PULSE = "RLKIT_PULSE"  # environment variable: the part's end of the socket pair
BEAT_S, SHOW_S = 1.0, 0.1
SILENCE_S = float(os.environ.get("RLKIT_SILENCE_S", "60"))  # longer where a machine stands still at times
START_S = 180.0  # from the start of a part to its first byte: imports
END_S = 60.0  # from SIGTERM to SIGKILL: a checkpoint is written meanwhile
CRASH_WINDOW_S, LONGEST_PAUSE_S = 600.0, 30.0
WRONG_INPUT = 2  # exit status of an RlkitError
LAST_WORDS = 3  # lines of a log in a report


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """One process of a run. `vital`: the run ends well when it does, and no other part may."""

    name: str
    command: Sequence[str]
    environment: Mapping[str, str] = field(default_factory=dict)  # in addition to the supervisor's own
    vital: bool = False


class PartFailed(RlkitError):
    """A part cannot go on; the message names it and says what it said last."""


@dataclass(slots=True)
class _Life:
    """What the supervisor knows of a part."""

    part: Part
    log: Path
    process: asyncio.subprocess.Process | None = None
    heard: float | None = None  # monotonic time of this life's last byte
    restarts: int = 0
    crashes: list[float] = field(default_factory=list)


@dataclass(slots=True)
class Supervisor:
    """Runs parts to their end. `report` adds to what is shown when something is wrong, such as the buffer's state.

    `crashed`: called in a thread with the process id of a part that died, before it is started again; says what it did.
    """

    folder: Path  # of the run: logs/ and supervisor.json, {part: times started again}
    silence_s: float = SILENCE_S
    most_crashes: int = 5
    report: Callable[[], str] = str
    crashed: Callable[[int], str] = lambda pid: ""
    _lives: list[_Life] = field(default_factory=list)

    async def run(self, parts: Sequence[Part]) -> int:
        """0 when the vital part ended well, 128 + n after signal n. Raises PartFailed."""
        logs = self.folder / "logs"
        logs.mkdir(parents=True, exist_ok=True)
        self._lives = [_Life(part, logs / f"{part.name}.log") for part in parts]
        whole, received = asyncio.current_task(), list[int]()
        assert whole is not None

        def interrupted(number: int) -> None:
            if not received:
                received.append(number)
                whole.cancel()

        for number in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(number, interrupted, number)
        shown = [asyncio.create_task(self._show(life)) for life in self._lives]
        keeping = {asyncio.create_task(self._keep(life)): life for life in self._lives}
        try:
            over = False
            while not over:
                done, _ = await asyncio.wait(keeping, return_when=asyncio.FIRST_COMPLETED)
                over = any(keeping[task].part.vital for task in done) or len(done) == len(keeping)
                for task in done:
                    task.result()  # raises what ended it
                    del keeping[task]
        except asyncio.CancelledError:
            self._say("supervisor", f"{signal.Signals(received[0]).name}: every process is asked to end")
            return 128 + received[0]
        finally:
            for task in keeping:
                task.cancel()
            await asyncio.gather(*keeping, return_exceptions=True)
            await asyncio.sleep(2 * SHOW_S)  # the last lines of the logs
            for task in shown:
                task.cancel()
        return 0

    async def _keep(self, life: _Life) -> None:
        """One part until it ends well, or crashes too often: PartFailed."""
        while True:
            status = await self._live(life)
            if status == 0:
                return
            now, how = time.monotonic(), f"signal {-status}" if status < 0 else f"status {status}"
            life.crashes = [then for then in life.crashes if now - then < CRASH_WINDOW_S] + [now]
            problem = f"{life.part.name} ended with {how}, {len(life.crashes)} times in {CRASH_WINDOW_S:.0f} s"
            if status == WRONG_INPUT or len(life.crashes) > self.most_crashes:
                raise PartFailed(f"{problem}\n{self.state(stacks=status != WRONG_INPUT)}", fix=f"see {life.log}")
            pause = min(LONGEST_PAUSE_S, 2.0 ** (len(life.crashes) - 1))
            self._say("supervisor", f"{problem}; starting it again in {pause:.0f} s")
            life.restarts += 1
            replace_file(self.folder / "supervisor.json", json.dumps(self.restarts()).encode())
            assert life.process is not None
            self._say("supervisor", await asyncio.to_thread(self.crashed, life.process.pid))
            await asyncio.sleep(pause)

    def restarts(self) -> dict[str, int]:
        """How often each part was started again."""
        return {life.part.name: life.restarts for life in self._lives}

    async def _live(self, life: _Life) -> int:
        """One life of a part: its exit status, -n where signal n ended it. Whatever ends this ends the process."""
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        environment = os.environ | {PULSE: str(theirs.fileno())} | dict(life.part.environment)
        with theirs, life.log.open("ab") as log:
            life.process = process = await asyncio.create_subprocess_exec(
                *life.part.command, stdin=asyncio.subprocess.DEVNULL, stdout=log, stderr=log, env=environment,
                pass_fds=[theirs.fileno()], start_new_session=True,
            )  # fmt: skip
        hearing = asyncio.create_task(self._hear(life, ours))
        try:
            return await process.wait()
        finally:
            if process.returncode is None:
                process.terminate()
                process.send_signal(signal.SIGCONT)  # a stopped one would not hear it
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(process.wait(), END_S)
            hearing.cancel()  # not before: a part that finds the other end closed would take that for a second signal
            ours.close()
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # what it leaves behind in its session, too
            await process.wait()

    async def _hear(self, life: _Life, pulse: socket.socket) -> None:
        """Answer a part's bytes; kill it when they stop."""
        loop, limit = asyncio.get_running_loop(), max(START_S, self.silence_s)
        life.heard = None
        while True:
            try:
                if not await asyncio.wait_for(loop.sock_recv(pulse, 64), limit):
                    return  # it has closed its end: it is ending
                await loop.sock_sendall(pulse, b".")
            except TimeoutError:
                assert life.process is not None
                try:
                    silent = f"{life.part.name} was silent for {limit:.0f} s and is killed"
                    self._say("supervisor", f"{silent}\n{self.state()}")
                finally:
                    os.killpg(life.process.pid, signal.SIGKILL)
                return
            except OSError:
                return
            life.heard, limit = time.monotonic(), self.silence_s

    def state(self, stacks: bool = True) -> str:
        """One screen: every part, its last words, and `report`. Living parts write their `stacks` to their logs."""
        lines = []
        for life in self._lives:
            process, words = life.process, life.log.read_text(errors="replace").splitlines()[-LAST_WORDS:]
            state = "not running"
            if process is not None and process.returncode is None:
                with contextlib.suppress(psutil.NoSuchProcess):
                    state = f"pid {process.pid}, {psutil.Process(process.pid).status()}"
                if life.heard is not None:
                    state += f", heard {time.monotonic() - life.heard:.0f} s ago"
                    if stacks:
                        process.send_signal(signal.SIGUSR1)
            lines += [f"{life.part.name}: {state}; restarts {life.restarts}", *(f"    {line}" for line in words)]
        return "\n".join([*lines, self.report()])

    async def _show(self, life: _Life) -> None:
        """Lines of a part's log on the console, from now on."""
        life.log.touch()
        with life.log.open("rb") as log:
            log.seek(0, os.SEEK_END)
            rest = b""
            while True:
                *lines, rest = (rest + log.read()).split(b"\n")
                for line in lines:
                    self._say(life.part.name, line.decode(errors="replace"))
                await asyncio.sleep(SHOW_S)

    def _say(self, name: str, text: str) -> None:
        width = max(10, *(len(life.part.name) for life in self._lives))
        for line in text.splitlines():
            with contextlib.suppress(OSError):  # the console is gone, the logs are not
                print(f"{name:>{width}} | {line}", flush=True)


def follow(silence_s: float = SILENCE_S) -> None:
    """In a part: answer to the supervisor from a thread, and end this process when that is silent or gone.

    Does nothing in a process without a supervisor. SIGUSR1 writes the stacks of all threads to stderr.
    """
    if (number := os.environ.pop(PULSE, None)) is None:
        return
    faulthandler.register(signal.SIGUSR1)
    pulse = socket.socket(fileno=int(number))
    pulse.set_inheritable(False)
    threading.Thread(target=_beat, args=(pulse, silence_s), name="pulse", daemon=True).start()


def _beat(pulse: socket.socket, silence_s: float) -> None:
    pulse.settimeout(silence_s)
    how, parent = "is gone", os.getppid()
    try:
        while pulse.send(b".") and pulse.recv(64):
            time.sleep(BEAT_S)
    except TimeoutError:
        how = f"was silent for {silence_s:.0f} s"
    except OSError:
        pass  # it is gone
    print(f"the supervisor (pid {parent}) {how}: this process ends", file=sys.stderr, flush=True)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(END_S)
    os._exit(1)
