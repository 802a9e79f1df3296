"""The zygote: imports the rewards once, then forks confined scoring children at the pool's command.

Run as `python -m rewards.zygote <pid of the pool>`, its end of a Unix socket pair as stdin. It never evaluates
model text: a child does, which serves samples on a socket of its own until the pool closes that. All messages
are JSON, one a line, decoded into typed records.
"""

import contextlib
import gc
import os
import signal
import socket
import sys
import time
import traceback
from typing import Any

import msgspec

from rewards.base import RewardError, Sample
from rewards.sandbox import Sandbox, die_with
from rewards.spec import build

decode = msgspec.json.decode


class Setup(msgspec.Struct, frozen=True):
    """Settings of a pool, see `VerifierPool`. Sent once; the answer is a list of `Weight`, or a RewardError's text.

    After that the pool sends pairs (pid, patience_s): end that child; the answer says in words how it ended. Or, with
    pid 0 and a socket beside it: fork a child that serves the socket; the answer is its pid.
    """

    spec: dict[str, dict[str, Any]]
    cpu_seconds: int
    memory_mb: int
    sandbox: str
    work_dir: str


def line(message: object) -> bytes:
    """One message as it is sent."""
    return msgspec.json.encode(message) + b"\n"


class Zygote:
    """Warm rewards, the sandbox of their children, and the children that live now."""

    def __init__(self, setup: Setup) -> None:
        """Import the rewards and warm them up. Raises RewardError."""
        self._setup = setup
        self._rewards = build(setup.spec)
        for function in self._rewards.functions:
            getattr(function, "warm_up", lambda: None)()
        self._sandbox = Sandbox(setup.sandbox, setup.cpu_seconds, setup.memory_mb)
        self._living: set[int] = set()  # pids of scoring children
        self._pid = os.getpid()

    def serve(self, control: socket.socket) -> None:
        """Obey until the pool closes the control socket; then end all children."""
        control.sendall(line(self._rewards.weights))
        while (message := socket.recv_fds(control, 4096, 1))[0]:
            pid, patience_s = decode(message[0], type=tuple[int, float])
            if pid == 0:
                control.sendall(line(self._fork(socket.socket(fileno=message[1][0]))))
            else:
                control.sendall(line(self._end(pid, patience_s)))
        for pid in list(self._living):
            self._end(pid)

    def _fork(self, peer: socket.socket) -> int:
        """Fork a child; it confines itself, says so (an empty text, or what failed), and scores."""
        if pid := os.fork():
            peer.close()
            self._living.add(pid)
            return pid
        try:
            try:
                os.setsid()  # where the kernel groups tasks by session, it gets a share of its own of a busy machine
                die_with(self._pid)
                for stream in (1, 2):
                    os.dup2(0, stream)  # /dev/null
                os.closerange(3, peer.fileno())
                os.closerange(peer.fileno() + 1, os.sysconf("SC_OPEN_MAX"))  # the control socket, too
                os.chdir(self._setup.work_dir)
                self._sandbox.enter()
            except Exception as error:  # whatever it is, the pool must hear of it
                peer.sendall(line(f"{type(error).__name__}: {error}"))
            else:
                peer.sendall(line(""))
                for request in peer.makefile("rb"):
                    index, sample = decode(request, type=tuple[int, Sample])
                    peer.sendall(line((index, self._rewards.measure(sample))))
        finally:  # none of the zygote's own exit handlers may run here
            os._exit(1)

    def _end(self, pid: int, patience_s: float = 0.0) -> str:
        """Kill the child after `patience_s`, with the session it leads, and reap it; say how it ended."""
        deadline = time.monotonic() + patience_s
        while not (ended := os.waitpid(pid, os.WNOHANG))[0] and time.monotonic() < deadline:
            time.sleep(0.001)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)  # mode `limits` lets it fork
        self._living.remove(pid)
        if not ended[0]:
            os.kill(pid, signal.SIGKILL)  # it may not lead a session yet
            os.waitpid(pid, 0)
            return "closed its result pipe"
        code = os.waitstatus_to_exitcode(ended[1])
        if code == -signal.SIGXCPU:
            return "used up its CPU time"
        return f"crashed (signal {-code})" if code < 0 else f"exited (status {code})"


def main() -> None:
    """Warm up and obey, or tell the pool why the rewards cannot be had."""
    die_with(int(sys.argv[1]))
    control = socket.socket(fileno=os.dup(0))
    os.dup2(os.open(os.devnull, os.O_RDWR), 0)
    try:
        with control.makefile("rb") as first:
            zygote = Zygote(decode(first.readline(), type=Setup))
    except RewardError as error:
        return control.sendall(line(str(error)))
    except (Exception, SystemExit):  # other people's code raises what it likes; the pool must hear of it
        return control.sendall(line(f"a reward's warm_up raised:\n{traceback.format_exc()}"))
    gc.collect()
    gc.freeze()  # children touch fewer of the shared pages
    zygote.serve(control)


if __name__ == "__main__":
    try:
        main()
        status = 0
    except BaseException:  # its traceback goes to the file that the pool quotes
        traceback.print_exc()
        status = 1
    sys.stderr.flush()
    os._exit(status)  # a reward's own threads must not keep alive what the pool has let go
