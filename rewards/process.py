"""The pool's handle on one worker process."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import msgspec

from rewards.errors import RewardError
from rewards.frames import FrameReader, FrameTooLarge, write_frame
from rewards.wire import Failed, Finished, Ready, Setup, decode, encode

__all__ = ["WorkerDied", "WorkerProcess"]

_REPLY_LIMIT_BYTES = 1 << 24
_STDERR_TAIL_BYTES = 4096
_EXIT_S = 2.0  # how long a worker may take to kill its child and end by itself
_KILL_S = 10.0
# What a worker inherits of the environment: nothing that could be a secret.
_KEPT_VARIABLES = (
    "PATH", "LANG", "LANGUAGE", "LC_ALL", "LC_CTYPE", "TZ", "VIRTUAL_ENV", "LD_LIBRARY_PATH",
    "PYTHONHASHSEED", "PYTHONUTF8", "PYTHONHOME",
)  # fmt: skip


class WorkerDied(Exception):
    """The worker process ended or stopped answering; the message says how."""


class WorkerProcess:
    """Starts a worker and exchanges frames with it. Use it from one thread only.

    That thread must outlive the worker: the kernel ends the worker with the thread that started it.
    """

    __slots__ = ("_process", "_reader", "_stderr_path", "_stdin", "_watch", "files_hidden")

    def __init__(self, setup: Setup, stderr_path: Path, start_timeout_s: float, watch: int) -> None:
        """Start the worker and wait until it is warm. Raises RewardError, WorkerDied, HungUp.

        watch: a pipe's read end; a byte in it ends every wait here with HungUp.
        """
        self._watch = watch
        self._stderr_path = stderr_path
        with stderr_path.open("wb") as stderr:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "rewards.worker", str(os.getpid())],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                env=_environment(setup.work_dir),
                # Ctrl-C at the terminal is for the pool's process, which ends its workers itself.
                start_new_session=True,
            )
        try:
            if self._process.stdin is None or self._process.stdout is None:
                raise WorkerDied("it has no pipes")
            self._stdin = self._process.stdin.fileno()
            os.set_blocking(self._stdin, False)
            self._reader = FrameReader(self._process.stdout.fileno(), _REPLY_LIMIT_BYTES, watch)
            deadline = time.monotonic() + start_timeout_s
            self.send(encode(setup), deadline)
            reply = self._read(Ready | Failed, deadline)
            if isinstance(reply, Failed):
                raise RewardError(reply.message)
            self.files_hidden: bool = reply.files_hidden
        except BaseException:
            self.end(graceful=False)
            raise

    @property
    def pid(self) -> int:
        return self._process.pid

    def send(self, payload: bytes, deadline: float) -> None:
        """Send a frame. Raises WorkerDied, HungUp."""
        try:
            write_frame(self._stdin, payload, deadline, self._watch)
        except BrokenPipeError:
            raise WorkerDied(self._how_it_ended()) from None
        except TimeoutError:
            raise WorkerDied("it did not take a batch in time") from None

    def receive(self, deadline: float) -> Finished:
        """The next score. Raises WorkerDied, HungUp."""
        reply: Finished = self._read(Finished, deadline)
        return reply

    def _read(self, kind: Any, deadline: float) -> Any:
        try:
            payload = self._reader.read(deadline)
        except TimeoutError:
            raise WorkerDied("it did not answer in time") from None
        except FrameTooLarge as error:
            raise WorkerDied(f"it sent a frame that is too large: {error}") from error
        if payload is None:
            raise WorkerDied(self._how_it_ended())
        try:
            return decode(payload, type=kind)
        except msgspec.DecodeError as error:
            raise WorkerDied(f"it sent what is no answer: {error}") from error

    def end(self, *, graceful: bool = True) -> None:
        """End the worker and its child, and reap it. Does nothing the second time."""
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None and not (graceful and pipe is self._process.stdout):
                pipe.close()
        if graceful:
            # Its stdin at an end, the worker kills and reaps its child before it leaves.
            try:
                self._process.wait(_EXIT_S)
            except subprocess.TimeoutExpired:
                graceful = False
        if not graceful and self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait(_KILL_S)
        if self._process.stdout is not None:
            self._process.stdout.close()

    def stderr_tail(self) -> str:
        """The last lines the worker wrote to stderr."""
        data = self._stderr_path.read_bytes()[-_STDERR_TAIL_BYTES:]
        return data.decode(errors="replace").strip()

    def _how_it_ended(self) -> str:
        try:
            code = self._process.wait(_EXIT_S)
        except subprocess.TimeoutExpired:
            return "it closed its pipe"
        return f"killed by signal {-code}" if code < 0 else f"exit status {code}"


def _environment(work_dir: str) -> dict[str, str]:
    kept = {name: os.environ[name] for name in _KEPT_VARIABLES if name in os.environ}
    package_root = str(Path(__file__).resolve().parent.parent)
    paths = [path or os.getcwd() for path in sys.path]
    return kept | {
        # The worker finds the modules its parent finds, and not one more.
        "PYTHONPATH": os.pathsep.join(dict.fromkeys([*paths, package_root])),
        "PYTHONSAFEPATH": "1",
        "PYTHONDONTWRITEBYTECODE": "1",
        "HOME": work_dir,
        "TMPDIR": work_dir,
        # A thread pool does not survive a fork, and each worker is meant to use one core.
        "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
        "MKL_NUM_THREADS": "1",
    }
