"""What pool, zygote and scoring child say to each other: JSON over Unix sockets, decoded into typed records."""

from __future__ import annotations

import socket
import struct
import time
from typing import Any

import msgspec

from rewards.sandbox import Limits

_HEADER = struct.Struct(">I")

encode = msgspec.json.encode
decode = msgspec.json.decode


class Setup(msgspec.Struct, frozen=True):
    """Pool to zygote, once; the answer is a list of `Weight`, or the text of a RewardError.

    cpu_seconds: CPU time a scoring child may use.
    """

    spec: dict[str, dict[str, Any]]
    cpu_seconds: int
    sandbox: str
    limits: Limits
    read_paths: list[str]
    work_dir: str


class Command(msgspec.Struct, frozen=True):
    """Pool to zygote: end the child `pid` after `patience_s`; the answer says in words how it ended.

    Without a pid, and with a socket beside it: fork a child that serves the socket; the answer is its pid.
    """

    pid: int | None = None
    patience_s: float = 0.0


def send(peer: socket.socket, payload: bytes, deadline: float | None = None) -> None:
    """Send a length-prefixed message. Raises TimeoutError at `deadline` (of `time.monotonic`), or another OSError."""
    _limit(peer, deadline)
    peer.sendall(_HEADER.pack(len(payload)) + payload)


def receive(peer: socket.socket, limit_bytes: int, deadline: float | None = None) -> bytes:
    """The next message. Raises as `send`, EOFError at its end, ValueError if it is longer than the limit."""
    (size,) = _HEADER.unpack(_take(peer, _HEADER.size, deadline))
    if size > limit_bytes:
        raise ValueError(f"{size} bytes announced, {limit_bytes} accepted")
    return _take(peer, size, deadline)


def _take(peer: socket.socket, size: int, deadline: float | None) -> bytes:
    taken = bytearray()
    while len(taken) < size:
        _limit(peer, deadline)
        chunk = peer.recv(min(size - len(taken), 1 << 16))
        if not chunk:
            raise EOFError("the other side closed the socket")
        taken += chunk
    return bytes(taken)


def _limit(peer: socket.socket, deadline: float | None) -> None:
    if deadline is not None:
        peer.settimeout(max(deadline - time.monotonic(), 1e-3))
