"""The zygote: imports the rewards once, then forks confined scoring children at the pool's command.

Run as `python -m rewards.zygote <pid of the pool>`, its end of a Unix socket pair as stdin. It never evaluates
model text: a child does, which serves samples on a socket of its own until the pool closes that. All messages
are JSON, one a line, decoded into typed records.
"""

from __future__ import annotations

import gc
import os
import shutil
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from functools import partial
from typing import Any, NoReturn

import msgspec

from rewards.base import RewardError, Sample
from rewards.sandbox import Limits, Sandbox, adopt_orphans, die_with, violations
from rewards.spec import Measurement, RewardSet, build

_MAX_TEXT_CHARS = 10_000
_PROBE_S = 10.0

decode = msgspec.json.decode


class Setup(msgspec.Struct, frozen=True):
    """Pool to zygote, once; the answer is a list of `Weight`, or the text of a RewardError.

    cpu_seconds: CPU time a scoring child may use.
    """

    spec: dict[str, dict[str, Any]]
    cpu_seconds: int
    sandbox: str
    limits: Limits
    read_paths: list[str]
    work_dir: str


class Command(msgspec.Struct, frozen=True):
    """Pool to zygote: end the child `pid` after `patience_s`; the answer says in words how it ended.

    Without a pid, and with a socket beside it: fork a child that serves the socket; the answer is its pid.
    """

    pid: int | None = None
    patience_s: float = 0.0


def line(message: object) -> bytes:
    """One message as it is sent."""
    return msgspec.json.encode(message) + b"\n"


class Zygote:
    """Warm rewards, the sandbox of their children, and the children that live now."""

    def __init__(self, setup: Setup, rewards: RewardSet) -> None:
        self._setup = setup
        self._rewards = rewards
        self._sandbox = Sandbox(setup.sandbox, setup.limits, setup.read_paths)
        self._kept = _children()  # what the rewards started themselves
        self._folders: dict[int, str] = {}  # a scoring child's pid: its working directory
        self._pid = os.getpid()

    def check_sandbox(self) -> None:
        """Have a confined child try what it must not be able to do. Raises RewardError."""
        ours, theirs = socket.socketpair()
        ours.settimeout(_PROBE_S)
        pid = self._fork(theirs, lambda peer: peer.sendall(", ".join(violations()).encode()))
        with ours, ours.makefile("r", errors="replace") as answers:
            text = decode(answers.readline() or '"it ended"', type=str) or answers.read()
        self._end(pid)
        if text:
            raise RewardError(
                f"sandbox 'strict' does not hold on this machine: {text}; "
                "choose sandbox=limits (resource limits only, see docs/rewards.md)"
            )

    def serve(self, control: socket.socket) -> None:
        """Obey until the pool closes the control socket; then end all children."""
        while True:
            payload, descriptors, _, _ = socket.recv_fds(control, 4096, 1)
            if not payload:
                break
            command = decode(payload, type=Command)
            if command.pid is None:
                peer = socket.socket(fileno=descriptors[0])
                control.sendall(line(self._fork(peer, partial(_score, rewards=self._rewards))))
            else:
                control.sendall(line(self._end(command.pid, command.patience_s)))
        for pid in list(self._folders):
            self._end(pid)

    def _fork(self, peer: socket.socket, work: Callable[[socket.socket], None]) -> int:
        """Fork a child that confines itself, says so on `peer` (an empty text, or what failed), and works."""
        folder = tempfile.mkdtemp(dir=self._setup.work_dir)
        pid = os.fork()
        if pid == 0:
            self._live(peer, folder, work)
        peer.close()
        self._folders[pid] = folder
        return pid

    def _live(self, peer: socket.socket, folder: str, work: Callable[[socket.socket], None]) -> NoReturn:
        """A child's life. It leaves by os._exit: none of the zygote's own exit handlers may run here."""
        problem = ""
        try:
            try:
                os.setsid()
                die_with(self._pid)
                _drop_descriptors({peer.fileno(), *self._sandbox.kept_fds()})
                os.chdir(folder)
                self._sandbox.enter(self._setup.cpu_seconds)
            except Exception as error:  # whatever it is, the pool must hear of it
                problem = f"{type(error).__name__}: {error}"
            peer.sendall(line(problem))
            if not problem:
                work(peer)
        finally:
            os._exit(1)

    def _end(self, pid: int, patience_s: float = 0.0) -> str:
        """Kill the child's session after `patience_s`, reap it, kill what it left behind; say how it ended."""
        deadline = time.monotonic() + patience_s
        while not (ended := os.waitpid(pid, os.WNOHANG))[0] and time.monotonic() < deadline:
            time.sleep(0.001)
        if not ended[0]:
            _kill(pid)
        shutil.rmtree(self._folders.pop(pid), ignore_errors=True)
        while orphans := _children() - self._kept - set(self._folders):  # mode `limits` lets it fork
            for orphan in orphans:
                _kill(orphan)
        if not ended[0]:
            return "closed its result pipe"
        code = os.waitstatus_to_exitcode(ended[1])
        if code == -signal.SIGXCPU:
            return "used up its CPU time"
        return f"crashed (signal {-code})" if code < 0 else f"exited (status {code})"


def _score(peer: socket.socket, rewards: RewardSet) -> None:
    """In a child: measure one sample after the other."""
    for request in peer.makefile("rb"):
        index, sample = decode(request, type=tuple[int, Sample])
        found = rewards.measure(sample)
        reasons = {name: _plain(reason) for name, reason in found.reasons.items()}
        answer = None if found.answer is None else _plain(found.answer)
        peer.sendall(line((index, Measurement(found.parts, reasons, answer))))


def _plain(text: str) -> str:
    """Cut to a sane length; without lone surrogates, which JSON cannot carry."""
    return text[:_MAX_TEXT_CHARS].encode("utf-8", "replace").decode("utf-8")


def _drop_descriptors(keep: set[int]) -> None:
    """Standard streams to /dev/null; all others but `keep` closed, the control socket too."""
    null = os.open(os.devnull, os.O_RDWR)
    for fd in (0, 1, 2):
        os.dup2(null, fd)
    low = 3
    for fd in sorted(keep):
        os.closerange(low, fd)
        low = fd + 1
    os.closerange(low, os.sysconf("SC_OPEN_MAX"))


def _children() -> set[int]:
    """Children of this process, adopted ones too."""
    try:
        with open(f"/proc/self/task/{os.getpid()}/children", encoding="ascii") as file:
            return {int(pid) for pid in file.read().split()}
    except FileNotFoundError:  # not Linux, or a kernel without it: nothing to adopt
        return set()


def _kill(pid: int) -> None:
    """SIGKILL a child, with its whole session if it leads one, and reap it."""
    if os.getpgid(pid) == pid:
        os.killpg(pid, signal.SIGKILL)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


def main() -> None:
    """Warm up, say so, obey."""
    die_with(int(sys.argv[1]))
    adopt_orphans()
    control = socket.socket(fileno=os.dup(0))
    with open(os.devnull, "rb") as null:
        os.dup2(null.fileno(), 0)
    with control.makefile("rb") as first:
        setup = decode(first.readline(), type=Setup)
    try:
        rewards = build(setup.spec)
        rewards.warm_up()
        zygote = Zygote(setup, rewards)
        if setup.sandbox == "strict":
            zygote.check_sandbox()
    except RewardError as error:
        return control.sendall(line(str(error)))
    except Exception as error:
        text = "".join(traceback.format_exception(error))
        return control.sendall(line(f"a reward's warm_up raised:\n{text}"))
    gc.collect()
    gc.freeze()  # children touch fewer of the shared pages
    control.sendall(line(rewards.weights))
    zygote.serve(control)


if __name__ == "__main__":
    status = 0
    try:
        main()
    except BrokenPipeError:  # the pool is gone
        pass
    except BaseException:
        traceback.print_exc()
        status = 1
    sys.stderr.flush()
    os._exit(status)  # a reward's own threads must not keep alive what the pool has let go
