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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from rewards.base import RewardError
from rewards.spec import Weight
from rewards.wire import Command, Setup, decode, encode, receive, send

GRACE_S = 15.0  # fork, confinement, kill and reaping on a busy machine
LONGEST_BACK_OFF_S = 5.0
_BACK_OFF_S = 0.1
_EXIT_S = 2.0  # how long a zygote may take to end its children and itself
_KILL_S = 10.0
_REPLY_LIMIT_BYTES = 1 << 24
# What a zygote inherits of the environment: nothing that could be a secret.
_KEPT_VARIABLES = (
    "PATH LANG LANGUAGE LC_ALL LC_CTYPE TZ VIRTUAL_ENV LD_LIBRARY_PATH PYTHONHASHSEED PYTHONUTF8 PYTHONHOME"
)


class ZygoteDied(Exception):
    """The zygote ended or stopped answering, and all its children with it; the message says how."""


@dataclass(frozen=True, slots=True)
class Zygote:
    """The process and the socket it takes commands on."""

    process: subprocess.Popen[bytes]
    control: socket.socket


@dataclass(frozen=True, slots=True)
class Child:
    """A confined scoring child of a zygote: it answers samples on `socket`, one at a time."""

    pid: int
    socket: socket.socket
    zygote: Zygote


class Keeper:
    """Keeps one zygote alive. Any thread may use it; each must live until `close` has returned.

    The kernel ends a zygote with the thread that started it.
    """

    def __init__(self, setup: Setup, start_timeout_s: float, max_restarts: int) -> None:
        self.zygote: Zygote | None = None
        self.restarts = 0
        self.weights: list[Weight] = []
        self._setup = setup
        self._start_timeout_s = start_timeout_s
        self._max_restarts = max_restarts
        self._stderr = Path(setup.work_dir, "zygote.stderr")
        self._deaths = 0  # in a row, without a child ended between
        self._last_death = ""
        self._exchange = threading.Lock()  # one exchange with the zygote at a time, its start included
        self._starting = threading.Lock()  # none is started once the pool is closing
        self._closing = threading.Event()

    def start(self) -> None:
        """Start a zygote unless one lives, again if it dies on the way. Raises RewardError."""
        with self._exchange:
            self._living()

    def fork(self) -> Child:
        """A fresh child, confined. Raises ZygoteDied, RewardError."""
        ours, theirs = socket.socketpair()
        try:
            with theirs, self._exchange:
                zygote = self._living()
                child = Child(self._ask(zygote, Command(), int, theirs), ours, zygote)
            try:
                problem = receive(ours, _REPLY_LIMIT_BYTES, time.monotonic() + GRACE_S)
            except (OSError, EOFError):
                with self._exchange:
                    raise self._bury(zygote, "did not confine a scoring child") from None
            if problem:
                raise RewardError(f"a scoring child could not be confined: {problem.decode(errors='replace')}")
        except BaseException:
            ours.close()
            raise
        return child

    def end(self, child: Child, patience_s: float = 0.0) -> str:
        """End a child, unless it ends by itself within `patience_s`; how it ended. Raises ZygoteDied."""
        child.socket.close()
        with self._exchange:
            ended: str = self._ask(child.zygote, Command(child.pid, patience_s), str)
            self._deaths = 0
            return ended

    def close(self) -> None:
        """End the zygote and all its children, and so wake every thread that waits for one of them."""
        with self._starting:
            self._closing.set()
            zygote = self.zygote
        if zygote is None:
            return
        with contextlib.suppress(OSError):  # it may be closed already
            zygote.control.shutdown(socket.SHUT_RDWR)
        _reap(zygote)
        self.zygote = None

    def _living(self) -> Zygote:
        while self.zygote is None:
            if self._deaths > self._max_restarts:
                words = self._stderr.read_bytes()[-4096:].decode(errors="replace").strip()
                raise RewardError(
                    f"the verifier's process died {self._deaths} times in a row ({self._last_death}); its last words:\n"
                    f"{words or '(nothing on stderr)'}"
                )
            if self._deaths:
                self._closing.wait(min(_BACK_OFF_S * 2 ** (self._deaths - 1), LONGEST_BACK_OFF_S))
            with contextlib.suppress(ZygoteDied):
                self._start()
        return self.zygote

    def _start(self) -> None:
        ours, theirs = socket.socketpair()
        with self._starting, theirs, self._stderr.open("wb") as stderr:
            if self._closing.is_set():
                raise RewardError("the verifier pool was closed")
            command = [sys.executable, "-m", "rewards.zygote", str(os.getpid())]
            environment = _environment(self._setup.work_dir)
            # A session of its own: Ctrl-C at the terminal is for the pool's process, which ends the zygote itself.
            process = subprocess.Popen(
                command, stdin=theirs.fileno(), stdout=stderr, stderr=stderr, env=environment, start_new_session=True
            )
            zygote = self.zygote = Zygote(process, ours)
        deadline = time.monotonic() + self._start_timeout_s
        try:
            send(ours, encode(self._setup), deadline)
            ready = decode(receive(ours, _REPLY_LIMIT_BYTES, deadline), type=list[Weight] | str)
        except (OSError, EOFError) as error:
            death = self._bury(zygote)
            if isinstance(error, TimeoutError):
                raise RewardError(
                    f"the rewards were not warm within start_timeout_s={self._start_timeout_s}; raise it, "
                    "or look at what they import and warm up"
                ) from error
            raise death from error
        if isinstance(ready, str):
            raise RewardError(ready)
        self.weights = ready

    def _ask(self, zygote: Zygote, command: Command, kind: type[Any], beside: socket.socket | None = None) -> Any:
        deadline = time.monotonic() + GRACE_S
        try:
            zygote.control.settimeout(GRACE_S)
            socket.send_fds(zygote.control, [encode(command)], [] if beside is None else [beside.fileno()])
            return decode(receive(zygote.control, _REPLY_LIMIT_BYTES, deadline), type=kind)
        except (OSError, EOFError, ValueError, msgspec.DecodeError) as error:
            raise self._bury(zygote) from error

    def _bury(self, zygote: Zygote, why: str = "") -> ZygoteDied:
        """See that the zygote is dead and reaped; the exception to raise."""
        code = _reap(zygote)
        zygote.control.close()
        death = why or (f"killed by signal {-code}" if code < 0 else f"exit status {code}")
        if self.zygote is zygote:  # else another thread was here before
            self.zygote = None
            self._deaths += 1
            self._last_death = death
            self.restarts += 1
        return ZygoteDied(death)


def _reap(zygote: Zygote) -> int:
    """Exit code of a zygote that is expected to end; it is killed if it does not within moments."""
    try:
        return zygote.process.wait(_EXIT_S)
    except subprocess.TimeoutExpired:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(zygote.process.pid, signal.SIGKILL)
        return zygote.process.wait(_KILL_S)


def _environment(work_dir: str) -> dict[str, str]:
    kept = {name: os.environ[name] for name in _KEPT_VARIABLES.split() if name in os.environ}
    package_root = str(Path(__file__).resolve().parent.parent)
    return kept | {
        # The zygote finds the modules its parent finds, and not one more.
        "PYTHONPATH": os.pathsep.join(dict.fromkeys([*(path or os.getcwd() for path in sys.path), package_root])),
        "PYTHONSAFEPATH": "1",
        "PYTHONDONTWRITEBYTECODE": "1",
        "HOME": work_dir,
        "TMPDIR": work_dir,
        # A thread pool does not survive a fork, and each child is meant to use one core.
        **dict.fromkeys(["OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"], "1"),
    }
