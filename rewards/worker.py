"""A verifier worker: imports the rewards once, then forks a confined child for each batch.

Run as `python -m rewards.worker <pid of the pool>`; frames on stdin and stdout. The worker itself
never evaluates model text: it forks, keeps the time, checks what comes back and adds it up.
"""

from __future__ import annotations

import contextlib
import gc
import math
import os
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence

import msgspec

from rewards.base import Sample, Score
from rewards.child import CONFINED, run_child
from rewards.errors import RewardError
from rewards.frames import FrameReader, FrameTooLarge, HungUp, write_frame
from rewards.sandbox import Sandbox, adopt_orphans, die_with, violations
from rewards.spec import Measurement, RewardSet, build
from rewards.wire import Batch, Failed, Finished, Measured, Outcome, Ready, Setup, decode, encode

__all__ = ["Worker", "main"]

CONFINE_S = 10.0  # a fork and a few system calls: only a stalled machine takes this long
REAP_S = 0.25  # how long a child that closed its pipe may take to end by itself
REQUEST_LIMIT_BYTES = 1 << 31
RESULT_LIMIT_BYTES = 1 << 20


class Worker:
    """The state of one worker: pipes to the pool, warm rewards, the sandbox of its children."""

    def __init__(self, requests: int, responses: int, setup: Setup, rewards: RewardSet) -> None:
        self._requests = requests
        self._responses = responses
        self._setup = setup
        self._rewards = rewards
        self._sandbox = Sandbox(setup.sandbox, setup.limits, setup.read_paths)
        self._kept_children = _children()
        self._pid = os.getpid()

    def check_sandbox(self) -> None:
        """Fork a confined child that tries what it must not be able to do. Raises RewardError."""
        if self._setup.sandbox != "strict":
            return
        reader, writer = os.pipe()
        pid = os.fork()
        if pid == 0:
            try:
                os.chdir(self._setup.work_dir)
                self._sandbox.enter(cpu_seconds=10)
                text = ", ".join(violations())
            except BaseException as error:
                text = f"{type(error).__name__}: {error}"
            os.write(writer, text.encode())
            os._exit(0)
        os.close(writer)
        with os.fdopen(reader, "rb") as file:
            text = file.read().decode()
        status = os.waitpid(pid, 0)[1]
        if text or status != 0:
            raise RewardError(
                f"sandbox 'strict' does not hold on this machine: {text or _ending(status)}; "
                "choose sandbox=limits (resource limits only, see docs/rewards.md)"
            )

    def serve(self) -> None:
        """Answer batches until the pool closes the pipe."""
        self._send(Ready(self._sandbox.files_hidden))
        reader = FrameReader(self._requests, REQUEST_LIMIT_BYTES)
        while (payload := reader.read(None)) is not None:
            samples = list(enumerate(decode(payload, type=Batch).samples))
            while samples:
                size = 1 if self._setup.isolated else len(samples)
                done = self._run_child(samples[:size])
                samples = samples[done:]

    def _run_child(self, samples: Sequence[tuple[int, Sample]]) -> int:
        """Score samples in one child until one of them ends it; return how many were answered."""
        cpu_seconds = math.ceil(self._setup.timeout_s * len(samples)) + 2
        work_dir = tempfile.mkdtemp(dir=self._setup.work_dir)
        reader, results = os.pipe()
        turns, starter = os.pipe()
        pid = os.fork()
        if pid == 0:
            run_child(self._pid, results, turns, self._rewards, self._sandbox, samples, work_dir, cpu_seconds)
        os.close(results)
        os.close(turns)
        ended = False
        try:
            frames = FrameReader(reader, RESULT_LIMIT_BYTES, watch=self._requests)
            _await_confined(frames)
            for count, (index, _) in enumerate(samples, start=1):
                started = time.monotonic()
                # A child that is gone already is found out by reading.
                with contextlib.suppress(BrokenPipeError):
                    os.write(starter, b"x")
                measured, outcome, reason = self._await_result(frames, index, started)
                if outcome == "crashed" and not reason:
                    reason, ended = _how_it_ended(pid), True
                seconds = time.monotonic() - started
                self._answer(index, measured, outcome, reason, seconds)
                if measured is None:
                    return count
            return len(samples)
        finally:
            os.close(reader)
            os.close(starter)
            if not ended:
                _kill(pid)
                os.waitpid(pid, 0)
            self._end_orphans()
            shutil.rmtree(work_dir, ignore_errors=True)

    def _await_result(self, frames: FrameReader, index: int, started: float) -> tuple[Measured | None, Outcome, str]:
        """(result, outcome, reason); a crash comes without a reason, the caller finds it out."""
        deadline = started + self._setup.timeout_s
        try:
            payload = frames.read(deadline)
        except TimeoutError:
            return None, "timeout", "timeout"
        except FrameTooLarge:
            return None, "crashed", "verifier sent a malformed result"
        if payload is None:
            return None, "crashed", ""
        try:
            measured = decode(payload, type=Measured)
        except (msgspec.DecodeError, UnicodeDecodeError):
            return None, "crashed", "verifier sent a malformed result"
        if measured.index != index:
            return None, "crashed", "verifier answered out of turn"
        return measured, "returned", ""

    def _answer(self, index: int, measured: Measured | None, outcome: Outcome, reason: str, seconds: float) -> None:
        if measured is None:
            parts: dict[str, float | None] = dict.fromkeys(self._rewards.names)
            score = Score(None, parts, None, reason, seconds)
        else:
            parts = {name: measured.parts.get(name) for name in self._rewards.names}
            result = Measurement(parts, measured.reasons, measured.answer)
            total, why = self._rewards.total(result)
            score = Score(total, parts, measured.answer, why, seconds)
        self._send(Finished(index, score, outcome))

    def _send(self, message: Ready | Finished) -> None:
        write_frame(self._responses, encode(message))

    def _end_orphans(self) -> None:
        """Kill what a child left behind (mode `limits` lets it fork)."""
        while orphans := _children() - self._kept_children:
            for pid in orphans:
                _kill(pid)
                os.waitpid(pid, 0)


def _await_confined(frames: FrameReader) -> None:
    try:
        first = frames.read(time.monotonic() + CONFINE_S)
    except TimeoutError:
        raise RewardError(f"a scoring child was not confined within {CONFINE_S} s") from None
    if first != CONFINED:
        why = "it ended" if first is None else first.decode(errors="replace")
        raise RewardError(f"a scoring child could not be confined: {why}")


def _children() -> set[int]:
    try:
        with open(f"/proc/self/task/{os.getpid()}/children", encoding="ascii") as file:
            return {int(pid) for pid in file.read().split()}
    except FileNotFoundError:  # not Linux, or a kernel without it: nothing to adopt
        return set()


def _kill(pid: int) -> None:
    """SIGKILL the child's whole session if it leads one, and the child itself."""
    try:
        if os.getpgid(pid) == pid:
            os.killpg(pid, signal.SIGKILL)
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return


def _how_it_ended(pid: int) -> str:
    """Reap a child that closed its pipe."""
    deadline = time.monotonic() + REAP_S
    while time.monotonic() < deadline:
        reaped, status = os.waitpid(pid, os.WNOHANG)
        if reaped:
            return f"verifier {_ending(status)}"
        time.sleep(0.001)
    _kill(pid)
    os.waitpid(pid, 0)
    return "verifier closed its result pipe"


def _ending(status: int) -> str:
    code = os.waitstatus_to_exitcode(status)
    if code == -signal.SIGXCPU:
        return "used up its CPU time"
    return f"crashed (signal {-code})" if code < 0 else f"exited (status {code})"


def main() -> int:
    """Entry point. Returns the exit status."""
    die_with(int(sys.argv[1]))
    adopt_orphans()
    # A reward that prints must not write into the frames: take the pipes away from 0 and 1.
    requests, responses = os.dup(0), os.dup(1)
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.dup2(2, 1)
    os.close(null)
    payload = FrameReader(requests, REQUEST_LIMIT_BYTES).read(None)
    if payload is None:
        return 0
    setup = decode(payload, type=Setup)
    try:
        rewards = build(setup.spec)
        rewards.warm_up()
        worker = Worker(requests, responses, setup, rewards)
        worker.check_sandbox()
    except RewardError as error:
        write_frame(responses, encode(Failed(str(error))))
        return 1
    except Exception as error:
        text = "".join(traceback.format_exception(error))
        write_frame(responses, encode(Failed(f"a reward's warm_up raised:\n{text}")))
        return 1
    # Children touch fewer of the shared pages.
    gc.collect()
    gc.freeze()
    try:
        worker.serve()
    except (HungUp, BrokenPipeError):
        return 0
    return 0


if __name__ == "__main__":
    # Threads of a reward must not keep a worker alive that the pool has let go.
    status = 1
    try:
        status = main()
    except BaseException:
        traceback.print_exc()
    sys.stderr.flush()
    os._exit(status)
