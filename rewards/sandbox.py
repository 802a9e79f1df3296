"""What a scoring child may do, applied in the child before it touches model text.

strict: resource limits, seccomp whitelist, and Landlock where the kernel has it.
limits: resource limits only; model text that is evaluated can then write files, open sockets and start processes.
"""

import errno
import os
import resource
import signal
import socket
import sys
from dataclasses import dataclass

from rewards import kernel
from rewards.base import RewardError
from rewards.kernel import compile_filter, process_control

_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER, _PR_SET_NO_NEW_PRIVS = 1, 36, 38
_MIB = 1 << 20
_MEND = "choose sandbox=limits (resource limits only, see docs/rewards.md)"


@dataclass(frozen=True, slots=True)
class Limits:
    """Resource limits of a scoring child.

    memory_mb: address space in MiB beyond what the warm process already maps.
    file_mb: largest file it may write, in MiB (mode `limits`; `strict` lets it write none).
    open_files: most file descriptors.
    """

    memory_mb: int = 1024
    file_mb: int = 16
    open_files: int = 64


def die_with(parent: int) -> None:
    """Have the kernel kill this process when its parent ends; exit now if it is gone already."""
    process_control(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def adopt_orphans() -> None:
    """Become the parent of descendants whose own parent ends, so that they can be killed."""
    process_control(_PR_SET_CHILD_SUBREAPER, 1)


class Sandbox:
    """Prepared once in the warm process, entered in each child. Raises RewardError if `strict` cannot be had here."""

    def __init__(self, mode: str, limits: Limits, read_paths: list[str]) -> None:
        self._limits = limits
        self._filter: bytes | None = None
        self._ruleset: int | None = None
        self._base_bytes = _mapped_bytes()
        if mode == "strict":
            self._filter = _seccomp_filter()
            paths = [*kernel.default_read_paths(), *read_paths]
            try:
                self._ruleset = kernel.landlock_ruleset(paths) if kernel.landlock_abi() > 0 else None
            except OSError as error:
                raise RewardError(f"sandbox 'strict': read_paths {paths}: {error}") from error

    def enter(self, cpu_seconds: int) -> None:
        """Confine this process for good. Call it single-threaded, in the forked child.

        Raises OSError, and RewardError if something is not refused that `strict` must refuse.
        """
        self._set_limits(cpu_seconds)
        if self._filter is None:
            return
        process_control(_PR_SET_NO_NEW_PRIVS, 1)
        if self._ruleset is not None:
            kernel.restrict_files(self._ruleset)
            os.close(self._ruleset)
        kernel.restrict_calls(self._filter)
        if escaped := _violations():
            raise RewardError(f"sandbox 'strict' does not hold on this machine: {', '.join(escaped)}; {_MEND}")

    def kept_fds(self) -> set[int]:
        """Descriptors the child must still hold when it enters."""
        return set() if self._ruleset is None else {self._ruleset}

    def _set_limits(self, cpu_seconds: int) -> None:
        wanted = {
            resource.RLIMIT_CORE: (0, 0),
            resource.RLIMIT_FSIZE: (self._limits.file_mb * _MIB,) * 2,
            resource.RLIMIT_NOFILE: (self._limits.open_files,) * 2,
            # SIGXCPU at the first, SIGKILL at the second.
            resource.RLIMIT_CPU: (cpu_seconds, cpu_seconds + 1),
        }
        if self._base_bytes is not None:
            wanted[resource.RLIMIT_AS] = (self._base_bytes + self._limits.memory_mb * _MIB,) * 2
        for kind, (soft, hard) in wanted.items():
            ceiling = resource.getrlimit(kind)[1]
            if ceiling != resource.RLIM_INFINITY:
                soft, hard = min(soft, ceiling), min(hard, ceiling)
            resource.setrlimit(kind, (soft, hard))


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


def _seccomp_filter() -> bytes:
    if sys.platform != "linux":
        raise RewardError(f"sandbox 'strict' needs Linux (this is {sys.platform}); move there or {_MEND}")
    try:
        return compile_filter()
    except ImportError as error:
        raise RewardError(f"sandbox 'strict' needs pyseccomp ({error}); pip install pyseccomp or {_MEND}") from error
    except (RuntimeError, OSError) as error:
        how = "install it (Debian: libseccomp2, Fedora: libseccomp)"
        raise RewardError(f"sandbox 'strict' needs the libseccomp library ({error}); {how} or {_MEND}") from error


def _mapped_bytes() -> int | None:
    """Address space this process maps now; None where /proc does not say."""
    try:
        with open("/proc/self/statm", encoding="ascii") as file:
            return int(file.read().split()[0]) * resource.getpagesize()
    except FileNotFoundError:
        return None
