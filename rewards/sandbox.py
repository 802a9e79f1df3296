"""What a scoring child may do, applied in the child before it touches model text, and not revocable.

strict: resource limits, and a whitelist of system calls (seccomp, by libseccomp): all others fail with EPERM.
limits: resource limits only. docs/rewards.md says what either prevents, and what not.
"""

import ctypes
import errno
import fcntl
import os
import resource
import signal
import socket
import sys
import termios
from importlib.resources import files
from pathlib import Path
from typing import Any

from rewards.base import RewardError

_ALLOWED = (files("rewards") / "system_calls.txt").read_text().split()  # whatever their arguments are
# glibc tries these first and falls back to the older call on ENOSYS only.
_ABSENT = ("clone3", "openat2", "close_range")
_CLONE_THREAD = 0x10000
# Any of these bits makes an open more than a read. O_TMPFILE's own bit comes without O_DIRECTORY.
_TMPFILE = getattr(os, "O_TMPFILE", 0) & ~os.O_DIRECTORY
_WRITING = os.O_ACCMODE | os.O_CREAT | os.O_TRUNC | os.O_APPEND | _TMPFILE
# F_SETOWN and F_SETSIG would send any signal to any process.
_FCNTL = (fcntl.F_DUPFD, fcntl.F_DUPFD_CLOEXEC, fcntl.F_GETFD, fcntl.F_SETFD, fcntl.F_GETFL, fcntl.F_SETFL)
_IOCTL = (termios.TCGETS, termios.FIONBIO, termios.FIOCLEX, termios.FIONCLEX, termios.FIONREAD)
_SOCKET_TYPE_MASK = 0xF
_FILE_MB, _OPEN_FILES = 16, 64
_PR_SET_PDEATHSIG, _libc = 1, ctypes.CDLL(None)
_MEND = "choose sandbox=limits (resource limits only, see docs/rewards.md)"


def die_with(parent: int) -> None:
    """Have the kernel kill this process when its parent ends; exit now if it is gone already. Raises OSError."""
    if sys.platform == "linux" and _libc.prctl(_PR_SET_PDEATHSIG, ctypes.c_ulong(signal.SIGKILL)):
        raise OSError("prctl(PR_SET_PDEATHSIG) failed")
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
        try:
            self._filter = _whitelist() if mode == "strict" else None
        except (ImportError, RuntimeError, OSError) as error:
            how = "pip install pyseccomp, and libseccomp (Debian: libseccomp2)"
            raise RewardError(f"sandbox 'strict' needs Linux with seccomp ({error}); {how}, or {_MEND}") from error

    def enter(self) -> None:
        """Confine this process for good. Call it single-threaded, in the forked child.

        Raises OSError, and RewardError if a socket is not refused, as `strict` must.
        """
        for kind, (soft, hard) in self._limits.items():
            ceiling = resource.getrlimit(kind)[1]
            if ceiling != resource.RLIM_INFINITY:
                soft, hard = min(soft, ceiling), min(hard, ceiling)
            resource.setrlimit(kind, (soft, hard))
        if self._filter is None:
            return
        self._filter.load()  # and no new privileges, whatever is executed
        try:
            socket.socket().close()
        except PermissionError:
            return
        raise RewardError(f"sandbox 'strict' does not hold on this machine: a socket was had; {_MEND}")


def _whitelist() -> Any:
    """As a filter that libseccomp can load. ImportError, RuntimeError without libseccomp."""
    import pyseccomp as seccomp

    rules = seccomp.SyscallFilter(seccomp.ERRNO(errno.EPERM))
    arch = seccomp.system_arch()

    def add(action: int, name: str, *conditions: Any) -> None:
        # A negative number: this architecture does not have the call.
        if seccomp.resolve_syscall(arch, name) >= 0:
            rules.add_rule(action, name, *conditions)

    for name in _ALLOWED:
        add(seccomp.ALLOW, name)
    for name in _ABSENT:
        add(seccomp.ERRNO(errno.ENOSYS), name)
    add(seccomp.ALLOW, "open", seccomp.Arg(1, seccomp.MASKED_EQ, _WRITING, os.O_RDONLY))
    add(seccomp.ALLOW, "openat", seccomp.Arg(2, seccomp.MASKED_EQ, _WRITING, os.O_RDONLY))
    add(seccomp.ALLOW, "clone", seccomp.Arg(0, seccomp.MASKED_EQ, _CLONE_THREAD, _CLONE_THREAD))
    # Reading a limit, not setting one.
    add(seccomp.ALLOW, "prlimit64", seccomp.Arg(2, seccomp.EQ, 0))
    # asyncio wakes itself through a socket pair. Streams only: a datagram can be sent elsewhere.
    stream = seccomp.Arg(1, seccomp.MASKED_EQ, _SOCKET_TYPE_MASK, socket.SOCK_STREAM)
    add(seccomp.ALLOW, "socketpair", seccomp.Arg(0, seccomp.EQ, socket.AF_UNIX), stream)
    for command in _FCNTL:
        add(seccomp.ALLOW, "fcntl", seccomp.Arg(1, seccomp.EQ, command))
    for request in _IOCTL:
        add(seccomp.ALLOW, "ioctl", seccomp.Arg(1, seccomp.EQ, request))
    return rules
