"""Landlock: which files a scoring child may read (Linux 5.13 and later, no privileges needed).

seccomp cannot look at a path. Landlock can: below the listed folders files may be read, all else is
closed, and nothing may be written anywhere. It also hides other processes' /proc/<pid>/environ.
"""

from __future__ import annotations

import ctypes
import os
import stat
import sys
from collections.abc import Iterable

from rewards.seccomp import checked, libc

_CREATE, _ADD, _RESTRICT = 444, 445, 446  # the same numbers on every architecture
_VERSION_FLAG, _PATH_BENEATH = 1, 1
_READ_FILE, _READ_DIR = 1 << 2, 1 << 3
# Rights known at ABI 1: execute, write, read, list, remove and make of every kind.
_ALL_V1 = (1 << 13) - 1
_REFER_V2, _TRUNCATE_V3, _IOCTL_V5 = 1 << 13, 1 << 14, 1 << 15


class _PathBeneath(ctypes.Structure):
    """struct landlock_path_beneath_attr of linux/landlock.h."""

    _pack_ = 1
    _fields_ = [("allowed_access", ctypes.c_uint64), ("parent_fd", ctypes.c_int32)]


def _syscall(number: int, *arguments: object) -> int:
    return checked(libc.syscall(ctypes.c_long(number), *arguments), "landlock")


def abi() -> int:
    """The kernel's Landlock version; 0 if it has none or it is switched off."""
    if sys.platform != "linux":
        return 0
    try:
        return _syscall(_CREATE, None, ctypes.c_size_t(0), ctypes.c_uint32(_VERSION_FLAG))
    except OSError:
        return 0


def default_read_paths() -> list[str]:
    """Where Python, its packages and the system's libraries and time zones lie."""
    fixed = "/usr /lib /lib64 /etc/ld.so.cache /etc/localtime /dev/null /dev/urandom /proc/cpuinfo /proc/meminfo"
    places = [*fixed.split(), sys.prefix, sys.base_prefix, *(path or os.getcwd() for path in sys.path)]
    return [path for path in dict.fromkeys(places) if os.path.exists(path)]


def create_ruleset(read_paths: Iterable[str]) -> int:
    """A ruleset's file descriptor that allows reading below `read_paths` only. Raises OSError."""
    version = abi()
    handled = _ALL_V1
    for needed, right in ((2, _REFER_V2), (3, _TRUNCATE_V3), (5, _IOCTL_V5)):
        handled |= right if version >= needed else 0
    attributes = ctypes.c_uint64(handled)  # struct landlock_ruleset_attr
    size = ctypes.c_size_t(ctypes.sizeof(attributes))
    ruleset = _syscall(_CREATE, ctypes.byref(attributes), size, ctypes.c_uint32(0))
    for path in read_paths:
        fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
        try:
            folder = stat.S_ISDIR(os.fstat(fd).st_mode)
            rule = _PathBeneath(_READ_FILE | (_READ_DIR if folder else 0), fd)
            _syscall(_ADD, ctypes.c_int(ruleset), ctypes.c_int(_PATH_BENEATH), ctypes.byref(rule), ctypes.c_uint32(0))
        finally:
            os.close(fd)
    return ruleset


def restrict_self(ruleset: int) -> None:
    """Apply the ruleset to this thread, for good. Needs no_new_privs. Raises OSError."""
    _syscall(_RESTRICT, ctypes.c_int(ruleset), ctypes.c_uint32(0))
