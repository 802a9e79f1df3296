"""What a scoring child may do, applied in the child before it touches model text.

strict: resource limits, seccomp whitelist, and Landlock where the kernel has it.
limits: resource limits only; model text that is evaluated can then write files, open sockets and start processes.
"""

import errno
import os
import resource
import signal
import socket
from pathlib import Path

from rewards import kernel
from rewards.base import RewardError
from rewards.kernel import compile_filter, process_control

_PR_SET_PDEATHSIG = 1
_FILE_MB, _OPEN_FILES = 16, 64
_MEND = "choose sandbox=limits (resource limits only, see docs/rewards.md)"


def die_with(parent: int) -> None:
    """Have the kernel kill this process when its parent ends; exit now if it is gone already."""
    process_control(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


class Sandbox:
    """Prepared once in the warm process, entered in each child. Raises RewardError if `strict` cannot be had here."""

    def __init__(self, mode: str, cpu_seconds: int, memory_mb: int) -> None:
        """cpu_seconds: of one child; memory_mb: its address space, in MiB beyond what this process maps now."""
        self._limits = {
            resource.RLIMIT_CORE: (0, 0),
            resource.RLIMIT_FSIZE: (_FILE_MB << 20,) * 2,  # in mode `limits`; `strict` lets it write none
            resource.RLIMIT_NOFILE: (_OPEN_FILES,) * 2,
            resource.RLIMIT_CPU: (cpu_seconds, cpu_seconds + 1),  # SIGXCPU at the first, SIGKILL at the second
        }
        if (statm := Path("/proc/self/statm")).exists():
            mapped = int(statm.read_text().split()[0]) * resource.getpagesize()
            self._limits[resource.RLIMIT_AS] = (mapped + (memory_mb << 20),) * 2
        self._filter: bytes | None = None
        self.ruleset: int | None = None  # a descriptor the child must still hold when it enters
        if mode == "strict":
            try:
                self._filter = compile_filter()
            except (ImportError, RuntimeError, OSError) as error:
                how = "pip install pyseccomp, and libseccomp (Debian: libseccomp2)"
                raise RewardError(f"sandbox 'strict' needs Linux with seccomp ({error}); {how}, or {_MEND}") from error
            self.ruleset = kernel.landlock_ruleset() if kernel.landlock_abi() > 0 else None

    def enter(self) -> None:
        """Confine this process for good. Call it single-threaded, in the forked child.

        Raises OSError, and RewardError if something is not refused that `strict` must refuse.
        """
        for kind, (soft, hard) in self._limits.items():
            ceiling = resource.getrlimit(kind)[1]
            if ceiling != resource.RLIM_INFINITY:
                soft, hard = min(soft, ceiling), min(hard, ceiling)
            resource.setrlimit(kind, (soft, hard))
        if self._filter is None:
            return
        kernel.confine(self._filter, self.ruleset)
        if escaped := _violations():
            raise RewardError(f"sandbox 'strict' does not hold on this machine: {', '.join(escaped)}; {_MEND}")


def _violations() -> list[str]:
    """Try what `strict` must refuse (that costs microseconds); return what was not refused."""
    attempts = {
        "write a file": lambda: os.open("probe", os.O_WRONLY | os.O_CREAT, 0o600),
        "fork": lambda: os.fork() or os._exit(0),
        "open a socket": lambda: socket.socket(socket.AF_INET, socket.SOCK_STREAM),
        "execute a program": lambda: os.execv("/nonexistent", ["nonexistent"]),
        "signal another process": lambda: os.kill(os.getppid(), 0),
    }
    escaped = []
    for name, attempt in attempts.items():
        try:
            attempt()
        except OSError as error:
            if error.errno in (errno.EPERM, errno.EACCES):
                continue
        escaped.append(name)
    return escaped
