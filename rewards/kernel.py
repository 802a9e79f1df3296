"""What the Linux kernel refuses a scoring child: system calls by seccomp, files by Landlock, neither of it revocable.

seccomp (libseccomp through pyseccomp) is a whitelist: all else fails with EPERM. Absent on purpose: execve, fork and
vfork (clone only with CLONE_THREAD), socket and connect, kill and its kin, ptrace, prctl, setrlimit, mount, and every
call that changes the file system.

seccomp cannot look at a path. Landlock can (Linux 5.13 and later, no privileges needed): below the listed folders files
may be read, all else is closed, and nothing may be written anywhere, which hides /proc/<pid>/environ too.
"""

import ctypes
import errno
import fcntl
import os
import socket
import stat
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
_CREATE, _ADD, _RESTRICT = 444, 445, 446  # the same numbers on every architecture
_VERSION_FLAG, _PATH_BENEATH = 1, 1
_READ_FILE, _READ_DIR = 1 << 2, 1 << 3
# Rights by the ABI that brought them: execute, write, read, list, remove, make of every kind; refer; truncate; ioctl.
_RIGHTS = {1: (1 << 13) - 1, 2: 1 << 13, 3: 1 << 14, 5: 1 << 15}
_PR_SET_SECCOMP, _PR_SET_NO_NEW_PRIVS, _SECCOMP_MODE_FILTER, _INSTRUCTION_BYTES = 22, 38, 2, 8


class _Program(ctypes.Structure):
    """struct sock_fprog of linux/filter.h."""

    _fields_ = [("count", ctypes.c_ushort), ("instructions", ctypes.c_char_p)]


_libc = ctypes.CDLL(None, use_errno=True)


def _checked(result: int, what: str) -> int:
    """The result of a C call, or OSError if it is negative."""
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, f"{what}: {os.strerror(code)}")
    return result


def process_control(option: int, value: int, argument: Any = ctypes.c_ulong(0)) -> None:  # noqa: B008
    """prctl(2). Raises OSError; does nothing where there is no prctl."""
    if sys.platform == "linux":
        _checked(_libc.prctl(option, ctypes.c_ulong(value), argument, *[ctypes.c_ulong(0)] * 2), f"prctl({option})")


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


class _PathBeneath(ctypes.Structure):
    """struct landlock_path_beneath_attr of linux/landlock.h."""

    _pack_ = 1
    _fields_ = [("allowed_access", ctypes.c_uint64), ("parent_fd", ctypes.c_int32)]


def _syscall(number: int, *arguments: object) -> int:
    return _checked(_libc.syscall(ctypes.c_long(number), *arguments), "landlock")


def landlock_abi() -> int:
    """The kernel's Landlock version; 0 if it has none or it is switched off."""
    if sys.platform != "linux":
        return 0
    try:
        return _syscall(_CREATE, None, ctypes.c_size_t(0), ctypes.c_uint32(_VERSION_FLAG))
    except OSError:
        return 0


def landlock_ruleset() -> int:
    """A ruleset's file descriptor: what Python, its packages and the system's libraries need may be read. OSError."""
    fixed = "/usr /lib /lib64 /etc/ld.so.cache /etc/localtime /dev/null /dev/urandom /proc/cpuinfo /proc/meminfo"
    places = [*fixed.split(), sys.prefix, sys.base_prefix, *(path or os.getcwd() for path in sys.path)]
    version = landlock_abi()
    handled = sum(rights for needed, rights in _RIGHTS.items() if version >= needed)
    attributes = ctypes.c_uint64(handled)  # struct landlock_ruleset_attr
    size = ctypes.c_size_t(ctypes.sizeof(attributes))
    ruleset = _syscall(_CREATE, ctypes.byref(attributes), size, ctypes.c_uint32(0))
    for path in filter(os.path.exists, dict.fromkeys(places)):
        fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
        try:
            folder = stat.S_ISDIR(os.fstat(fd).st_mode)
            rule = _PathBeneath(_READ_FILE | (_READ_DIR if folder else 0), fd)
            _syscall(_ADD, ctypes.c_int(ruleset), ctypes.c_int(_PATH_BENEATH), ctypes.byref(rule), ctypes.c_uint32(0))
        finally:
            os.close(fd)
    return ruleset


def confine(program: bytes, ruleset: int | None) -> None:
    """Apply a compiled filter, and a ruleset, which is closed, to this thread for good. Raises OSError."""
    process_control(_PR_SET_NO_NEW_PRIVS, 1)
    if ruleset is not None:
        _syscall(_RESTRICT, ctypes.c_int(ruleset), ctypes.c_uint32(0))
        os.close(ruleset)
    wanted = _Program(len(program) // _INSTRUCTION_BYTES, program)
    process_control(_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, ctypes.byref(wanted))
