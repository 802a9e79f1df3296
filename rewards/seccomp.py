"""The system calls a scoring child may make (Linux, libseccomp through pyseccomp).

Everything not named here fails with EPERM. Absent on purpose: execve, fork and vfork (clone only with CLONE_THREAD),
socket and connect, kill and its kin, ptrace, prctl, setrlimit, mount, and every call that changes the file system.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import socket
import sys
import tempfile
import termios
from typing import Any

_ALLOWED = """
    mmap munmap mprotect mremap madvise brk mincore membarrier rseq
    read readv pread64 preadv preadv2 write writev close dup dup2 dup3 lseek fadvise64
    fstat stat lstat newfstatat statx statfs fstatfs access faccessat faccessat2 readlink readlinkat getdents getdents64
    getcwd pipe pipe2 eventfd2 epoll_create epoll_create1 epoll_ctl epoll_wait epoll_pwait epoll_pwait2
    poll ppoll select pselect6 recvfrom recvmsg sendto sendmsg shutdown getsockname getpeername getsockopt
    futex futex_waitv set_robust_list get_robust_list set_tid_address gettid arch_prctl
    rt_sigaction rt_sigprocmask rt_sigreturn rt_sigpending rt_sigtimedwait sigaltstack
    alarm setitimer getitimer restart_syscall wait4 waitid exit exit_group
    getpid getppid getuid geteuid getgid getegid getresuid getresgid getgroups getpgrp getpgid getsid
    uname sysinfo getrusage getrlimit times getcpu sched_getaffinity sched_yield sched_getparam sched_getscheduler
    clock_gettime clock_getres clock_nanosleep nanosleep gettimeofday time getrandom
""".split()  # noqa: SIM905 - a list literal would hide the groups

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
_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, _INSTRUCTION_BYTES = 22, 2, 8


class _Program(ctypes.Structure):
    """struct sock_fprog of linux/filter.h."""

    _fields_ = [("count", ctypes.c_ushort), ("instructions", ctypes.c_char_p)]


libc = ctypes.CDLL(None, use_errno=True)


def checked(result: int, what: str) -> int:
    """The result of a C call, or OSError if it is negative."""
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, f"{what}: {os.strerror(code)}")
    return result


def process_control(option: int, value: int, argument: Any = ctypes.c_ulong(0)) -> None:  # noqa: B008
    """prctl(2). Raises OSError; does nothing where there is no prctl."""
    if sys.platform == "linux":
        checked(libc.prctl(option, ctypes.c_ulong(value), argument, *[ctypes.c_ulong(0)] * 2), f"prctl({option})")


def install(program: bytes) -> None:
    """Apply a compiled filter to this thread, for good. Needs no_new_privs. Raises OSError."""
    wanted = _Program(len(program) // _INSTRUCTION_BYTES, program)
    process_control(_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, ctypes.byref(wanted))


def compile_filter() -> bytes:
    """The whitelist as a BPF program: compiled once, since that takes longer than a fork.

    Raises ImportError without pyseccomp, RuntimeError or OSError without libseccomp.
    """
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
    with tempfile.TemporaryFile() as file:
        rules.export_bpf(file)
        file.seek(0)
        return file.read()
