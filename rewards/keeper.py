"""The pool's hold on its zygote: keeps one alive, and has it fork and end scoring children."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

from rewards.base import RewardError
from rewards.spec import Weight
from rewards.zygote import Setup, decode, line

# What an exchange raises: the other side is gone (or late: TimeoutError is an OSError), or it talks nonsense.
GONE = (OSError, EOFError)
MALFORMED = (ValueError, RecursionError)

_START_S = 60.0  # to import the rewards and warm them up
_BACK_OFF_S, _LONGEST_BACK_OFF_S = 0.05, 5.0  # doubled from death to death
_MAX_RESTARTS = 5  # in a row; then the pool fails
_GRACE_S = 15.0  # fork, confinement, kill and reaping on a busy machine
_EXIT_S = 2.0  # how long a zygote may take to end its children and itself
_KILL_S = 10.0
_REPLY_LIMIT_BYTES = 1 << 20
# What a zygote inherits of the environment: nothing that could be a secret.
_KEPT = "PATH LANG LANGUAGE LC_ALL LC_CTYPE TZ VIRTUAL_ENV LD_LIBRARY_PATH PYTHONHASHSEED PYTHONUTF8 PYTHONHOME"


class ZygoteDied(RewardError):
    """The zygote ended or stopped answering, and all its children with it; the message says how."""


class Peer:
    """A process at the other end of a socket: one line is sent there, one comes back."""

    def __init__(self, ours: socket.socket) -> None:
        self.socket = ours
        self._received = b""

    def ask(self, request: bytes, kind: Any, limit_s: float) -> Any:
        """Send a line, if there is one, and decode the line that answers it. Raises GONE, MALFORMED."""
        deadline = time.monotonic() + limit_s
        self.socket.settimeout(limit_s)
        self.socket.sendall(request)
        while b"\n" not in self._received:
            self.socket.settimeout(max(deadline - time.monotonic(), 1e-6))
            received = self.socket.recv(1 << 16)
            if not received or len(self._received) > _REPLY_LIMIT_BYTES:
                raise ValueError("a line without an end") if received else EOFError
            self._received += received
        answer, _, self._received = self._received.partition(b"\n")
        return decode(answer, type=kind)


class Zygote(Peer):
    """The warm process."""

    def __init__(self, ours: socket.socket, process: subprocess.Popen[bytes]) -> None:
        super().__init__(ours)
        self.process = process

    def __del__(self) -> None:
        # Not where it is buried: its number, used again, would mislead a thread that still waits on it.
        self.socket.close()


class Child(Peer):
    """A confined scoring child of a zygote: it answers samples until it is ended."""

    def __init__(self, ours: socket.socket, zygote: Zygote, pid: int) -> None:
        super().__init__(ours)
        self.zygote, self.pid, self.alive, self.served = zygote, pid, True, 0


class Keeper:
    """Keeps one zygote alive, for several threads. Those that call `fork` must live until `close` is done."""

    def __init__(self, setup: Setup) -> None:
        self.zygote: Zygote | None = None
        self.restarts = 0
        self.weights: list[Weight] = []
        self._setup = setup
        self._stderr = Path(setup.work_dir, "zygote.stderr")
        self._deaths: list[str] = []  # in a row, without a child ended between
        self._exchange = threading.Lock()  # one exchange with the zygote at a time, its start included
        self._change = threading.Lock()  # over `zygote` and what is counted with it
        self._closing = threading.Event()

    def fork(self) -> Child:
        """A fresh child, confined, of a fresh zygote if need be. Raises ZygoteDied: ask again; and RewardError."""
        ours, theirs = socket.socketpair()
        try:
            with theirs, self._exchange:  # held open here, their end would hide the child's death
                zygote = self.zygote or self._start()
                child = Child(ours, zygote, self._ask(zygote, (0, 0.0), int, theirs.fileno()))
            try:
                problem = child.ask(b"", str, _GRACE_S)
            except (*GONE, *MALFORMED):
                raise self._bury(zygote, "did not confine a scoring child") from None
            if problem:
                raise RewardError(f"a scoring child could not be confined: {problem}")
        except BaseException:  # raised again: whatever it is, no socket stays open
            ours.close()
            raise
        return child

    def end(self, child: Child, patience_s: float = 0.0) -> str:
        """End a child, unless it ends by itself within `patience_s`; how it ended. Raises ZygoteDied."""
        child.alive = False
        child.socket.close()
        with self._exchange:
            ended: str = self._ask(child.zygote, (child.pid, patience_s), str)
        self._deaths.clear()
        return ended

    def close(self) -> None:
        """End the zygote and all its children, and so whatever waits for one of them; start none again."""
        with self._change:
            self._closing.set()
            zygote = self.zygote
        if zygote is not None:
            self._bury(zygote)

    def _start(self) -> Zygote:
        """Start a zygote. Raises ZygoteDied, RewardError."""
        if len(self._deaths) > _MAX_RESTARTS:
            words = self._stderr.read_bytes()[-4096:].decode(errors="replace").strip() or "(nothing on stderr)"
            how = f"died {len(self._deaths)} times in a row ({self._deaths[-1]})"
            raise RewardError(f"the verifier's warm process {how}; its last words:\n{words}")
        if self._deaths:
            self._closing.wait(min(_BACK_OFF_S * 2 ** len(self._deaths), _LONGEST_BACK_OFF_S))
        ours, theirs = socket.socketpair()
        with theirs, self._change, self._stderr.open("wb") as stderr:
            if self._closing.is_set():
                ours.close()
                raise RewardError("the verifier pool was closed; make a new one")
            command, environment = [sys.executable, "-m", "rewards.zygote", str(os.getpid())], self._environment()
            # A session of its own: Ctrl-C at the terminal is for the pool's process, which ends its zygote itself.
            process = subprocess.Popen(
                command, stdin=theirs.fileno(), stdout=stderr, stderr=stderr, env=environment, start_new_session=True
            )
            zygote = self.zygote = Zygote(ours, process)
        try:
            ready = zygote.ask(line(self._setup), list[Weight] | str, _START_S)
        except TimeoutError:
            self._bury(zygote)
            raise RewardError(f"no warm rewards within {_START_S} s; see what they do at start") from None
        except (*GONE, *MALFORMED) as error:
            raise self._bury(zygote) from error
        if isinstance(ready, str):
            raise RewardError(ready)
        self.weights = ready
        return zygote

    def _ask(self, zygote: Zygote, command: tuple[int, float], kind: Any, *descriptors: int) -> Any:
        try:
            socket.send_fds(zygote.socket, [line(command)], descriptors)
            return zygote.ask(b"", kind, _GRACE_S)
        except (*GONE, *MALFORMED) as error:
            raise self._bury(zygote) from error

    def _bury(self, zygote: Zygote, why: str = "") -> ZygoteDied:
        """See that the zygote and its children are dead and reaped; the exception to raise."""
        with contextlib.suppress(OSError):  # it may be gone already
            zygote.socket.shutdown(socket.SHUT_RDWR)  # upon that it ends its children and itself
        try:
            code = zygote.process.wait(_EXIT_S)
        except subprocess.TimeoutExpired:
            zygote.process.kill()
            code = zygote.process.wait(_KILL_S)
        death = why or (f"killed by signal {-code}" if code < 0 else f"exit status {code}")
        with self._change:
            if self.zygote is zygote:  # else it was buried before
                with contextlib.suppress(ProcessLookupError):  # its session: what it could not end itself
                    os.killpg(zygote.process.pid, signal.SIGKILL)
                self.zygote = None
                self.restarts += not self._closing.is_set()
                self._deaths.append(death)
        return ZygoteDied(death)

    def _environment(self) -> dict[str, str]:
        kept = {name: os.environ[name] for name in _KEPT.split() if name in os.environ}
        package_root = str(Path(__file__).resolve().parent.parent)
        # The zygote finds the modules its parent finds, and not one more.
        places = dict.fromkeys([*(path or os.getcwd() for path in sys.path), package_root])
        python = {"PYTHONPATH": os.pathsep.join(places), "PYTHONSAFEPATH": "1", "PYTHONDONTWRITEBYTECODE": "1"}
        # A thread pool does not survive a fork, and each child is meant to use one core.
        threads = dict.fromkeys(["OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"], "1")
        return kept | python | threads | dict.fromkeys(["HOME", "TMPDIR"], self._setup.work_dir)
