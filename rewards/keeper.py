"""The pool's hold on its zygote: keeps one alive, and has it fork and end scoring children."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from rewards.base import RewardError
from rewards.spec import Weight
from rewards.zygote import Setup, decode, line

# What an exchange raises: the other side is gone (or late: TimeoutError is an OSError), or it talks nonsense.
GONE = (OSError, EOFError)
MALFORMED = (ValueError, RecursionError, msgspec.DecodeError)

_START_S = 60.0  # to import the rewards and warm them up
_MAX_RESTARTS = 5  # in a row; then the pool fails
_GRACE_S = 15.0  # fork, confinement, kill and reaping on a busy machine
_BACK_OFF_S, _LONGEST_BACK_OFF_S = 0.1, 5.0
_EXIT_S = 2.0  # how long a zygote may take to end its children and itself
_KILL_S = 10.0
_REPLY_LIMIT_BYTES = 1 << 20
# What a zygote inherits of the environment: nothing that could be a secret.
_KEPT_VARIABLES = (
    "PATH LANG LANGUAGE LC_ALL LC_CTYPE TZ VIRTUAL_ENV LD_LIBRARY_PATH PYTHONHASHSEED PYTHONUTF8 PYTHONHOME"
)


class ZygoteDied(RewardError):
    """The zygote ended or stopped answering, and all its children with it; the message says how."""


class Peer:
    """The other end of a socket: one line is sent there, one comes back."""

    def __init__(self, ours: socket.socket, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.socket = ours
        self.reader = reader
        self.writer = writer

    @classmethod
    async def connect(cls, ours: socket.socket) -> Peer:
        return cls(ours, *await asyncio.open_unix_connection(sock=ours, limit=_REPLY_LIMIT_BYTES))

    async def ask(self, request: bytes, kind: Any, limit_s: float) -> Any:
        """Send a line, if there is one, and decode the line that answers it. Raises GONE, MALFORMED."""
        async with asyncio.timeout(limit_s):
            self.writer.write(request)
            await self.writer.drain()
            answer = await self.reader.readline()
            if not answer.endswith(b"\n"):
                raise EOFError("the socket was closed at the other end")
            return decode(answer, type=kind)


@dataclass(frozen=True, slots=True)
class Zygote:
    process: subprocess.Popen[bytes]
    peer: Peer


@dataclass(frozen=True, slots=True)
class Child:
    """A confined scoring child of a zygote: it answers samples."""

    pid: int
    zygote: Zygote
    peer: Peer


class Keeper:
    """Keeps one zygote alive. It belongs to one event loop, whose thread must live until `close` is done.

    The kernel ends a zygote with the thread that started it.
    """

    def __init__(self, setup: Setup) -> None:
        self.zygote: Zygote | None = None
        self.restarts = 0
        self.weights: list[Weight] = []
        self._setup = setup
        self._stderr = Path(setup.work_dir, "zygote.stderr")
        self._deaths: list[str] = []  # in a row, without a child ended between
        self._exchange = asyncio.Lock()  # one exchange with the zygote at a time, its start included
        self._closed = False

    async def fork(self) -> Child:
        """A fresh child, confined. Raises RewardError."""
        while True:
            with contextlib.suppress(ZygoteDied):  # another is started, until it has died too often
                return await self._fork()

    async def _fork(self) -> Child:
        ours, theirs = socket.socketpair()
        peer = await Peer.connect(ours)
        with theirs, contextlib.ExitStack() as on_failure:
            on_failure.callback(peer.writer.close)
            async with self._exchange:
                zygote = self.zygote or await self._start()
                child = Child(await self._ask(zygote, (0, 0.0), int, theirs.fileno()), zygote, peer)
            theirs.close()  # held open here, it would hide the child's death
            try:
                problem = await peer.ask(b"", str, _GRACE_S)
            except (*GONE, *MALFORMED):
                raise self._bury(zygote, "did not confine a scoring child") from None
            if problem:
                raise RewardError(f"a scoring child could not be confined: {problem}")
            on_failure.pop_all()
        return child

    async def end(self, child: Child, patience_s: float = 0.0) -> str:
        """End a child, unless it ends by itself within `patience_s`; how it ended. Raises ZygoteDied."""
        child.peer.writer.close()
        async with self._exchange:
            ended: str = await self._ask(child.zygote, (child.pid, patience_s), str)
        self._deaths.clear()
        return ended

    def close(self) -> None:
        """End the zygote and all its children, and so whatever waits for one of them; start none again."""
        self._closed = True
        if self.zygote is not None:
            self._bury(self.zygote)

    async def _start(self) -> Zygote:
        """Start a zygote, after a pause if it has died before. Raises ZygoteDied, RewardError."""
        deaths = len(self._deaths)
        if deaths > _MAX_RESTARTS:
            words = self._stderr.read_bytes()[-4096:].decode(errors="replace").strip() or "(nothing on stderr)"
            how = f"died {deaths} times in a row ({self._deaths[-1]})"
            raise RewardError(f"the verifier's warm process {how}; its last words:\n{words}")
        if deaths:
            await asyncio.sleep(min(_BACK_OFF_S * 2 ** (deaths - 1), _LONGEST_BACK_OFF_S))
        if self._closed:
            raise RewardError("the verifier pool was closed; make a new one")
        ours, theirs = socket.socketpair()
        peer = await Peer.connect(ours)
        with theirs, self._stderr.open("wb") as stderr:
            process = subprocess.Popen(
                [sys.executable, "-m", "rewards.zygote", str(os.getpid())],
                stdin=theirs.fileno(),
                stdout=stderr,
                stderr=stderr,
                env=_environment(self._setup.work_dir),
                # Ctrl-C at the terminal is for the pool's process, which ends its zygote itself.
                start_new_session=True,
            )
        zygote = self.zygote = Zygote(process, peer)
        try:
            ready = await peer.ask(line(self._setup), list[Weight] | str, _START_S)
        except TimeoutError:
            self._bury(zygote)
            raise RewardError(f"no warm rewards within {_START_S} s; see what they do at start") from None
        except (*GONE, *MALFORMED) as error:
            raise self._bury(zygote) from error
        if isinstance(ready, str):
            raise RewardError(ready)
        self.weights = ready
        return zygote

    async def _ask(self, zygote: Zygote, command: tuple[int, float], kind: Any, *descriptors: int) -> Any:
        try:
            socket.send_fds(zygote.peer.socket, [line(command)], descriptors)
            return await zygote.peer.ask(b"", kind, _GRACE_S)
        except (*GONE, *MALFORMED) as error:
            raise self._bury(zygote) from error

    def _bury(self, zygote: Zygote, why: str = "") -> ZygoteDied:
        """See that the zygote and its children are dead and reaped; the exception to raise."""
        with contextlib.suppress(OSError):  # it may be gone already
            zygote.peer.socket.shutdown(socket.SHUT_RDWR)  # upon that it ends its children and itself
        zygote.peer.writer.close()
        try:
            code = zygote.process.wait(_EXIT_S)
        except subprocess.TimeoutExpired:
            zygote.process.kill()
            code = zygote.process.wait(_KILL_S)
        with contextlib.suppress(ProcessLookupError):  # its session: what it could not end itself
            os.killpg(zygote.process.pid, signal.SIGKILL)
        death = why or (f"killed by signal {-code}" if code < 0 else f"exit status {code}")
        if self.zygote is zygote:  # else it was buried before
            self.zygote = None
            self.restarts += not self._closed
            self._deaths.append(death)
        return ZygoteDied(death)


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
