"""Opening: what is refused, and several processes on one database."""

from __future__ import annotations

import json
import os
import re
import socket
import sqlite3
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
from buffer_work import Clock, open_at, request, train
from sqlalchemy import text

from rlkit.buffer import database
from rlkit.buffer.database import parsed, refuse_network_filesystem
from rlkit.buffer.sql import SqlBuffer
from rlkit.errors import BufferError

MOUNTS = [
    SimpleNamespace(mountpoint=place, fstype=kind)
    for place, kind in (
        ("/", "ext4"), ("/home", "nfs4"), ("/home/me/local", "xfs"), ("/mnt/my share", "cifs"), ("/over", "nfs"),
        ("/over", "tmpfs"), ("/cloud", "fuse.sshfs"), ("/layers", "fuse.fuse-overlayfs"),
    )
]  # fmt: skip


@pytest.mark.parametrize(
    ("path", "kind", "refused"),
    [
        ("/runs/a/buffer.db", "ext4", False),
        ("/home/me/buffer.db", "nfs4", True),
        ("/homes/me/buffer.db", "ext4", False),
        ("/home/me/local/buffer.db", "xfs", False),
        ("/mnt/my share/buffer.db", "cifs", True),
        ("/over/buffer.db", "tmpfs", False),
        ("/cloud/buffer.db", "fuse.sshfs", True),
        ("/layers/buffer.db", "fuse.fuse-overlayfs", False),
    ],
)
def test_network_filesystems_are_refused(path: str, kind: str, refused: bool) -> None:
    if refused:
        with pytest.raises(BufferError, match=f"network filesystem \\({kind}\\)"):
            refuse_network_filesystem(Path(path), MOUNTS)
    else:
        refuse_network_filesystem(Path(path), MOUNTS)


def test_this_machines_mount_table_is_understood(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Were every filesystem of this machine a network's, a buffer here would be refused."""
    monkeypatch.setattr(database, "_NETWORK", re.compile(r"\w+"))
    with pytest.raises(BufferError, match=r"network filesystem \(\w+\)"):
        refuse_network_filesystem(tmp_path / "buffer.db", psutil.disk_partitions(all=True))


@pytest.mark.parametrize("url", ["mongodb://host/db", "buffer.db", "sqlite://", "sqlite:///:memory:", "mysql://x/y"])
def test_other_urls_are_refused(url: str) -> None:
    with pytest.raises(BufferError, match=r"buffer\.url"):
        parsed(url)


def test_pragmas(buffer: SqlBuffer) -> None:
    with buffer._db.read() as connection:
        found = {
            name: connection.execute(text(f"PRAGMA {name}")).scalar()
            for name in ("journal_mode", "foreign_keys", "busy_timeout", "synchronous")
        }
    assert found == {"journal_mode": "wal", "foreign_keys": 1, "busy_timeout": 90_000, "synchronous": 1}


@pytest.mark.parametrize("setting", [{"prompts": 3}, {"staleness": 0}])
def test_a_database_keeps_its_settings(tmp_path: Path, setting: dict[str, int]) -> None:
    open_at(tmp_path, Clock()).close()
    open_at(tmp_path, Clock(), slice_samples=7).close()
    with pytest.raises(BufferError, match="was made with"):
        open_at(tmp_path, Clock(), **setting)


def test_damage_is_found_at_opening(tmp_path: Path) -> None:
    buffer = open_at(tmp_path, Clock())
    request(buffer, 4)
    buffer.close()
    path = tmp_path / "buffer.db"
    clean = path.read_bytes()
    dirty = bytearray(clean)
    dirty[4096 * 3 : 4096 * 4] = b"\xa5" * 4096
    path.write_bytes(dirty)
    with pytest.raises(BufferError, match=r"damaged|malformed"):
        open_at(tmp_path, Clock())
    path.write_bytes(b"this is no database, whatever its name says" * 100)
    with pytest.raises(BufferError, match="not a database"):
        open_at(tmp_path, Clock())
    path.write_bytes(clean)
    open_at(tmp_path, Clock()).close()


def test_a_writer_that_never_ends_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(database, "BUSY_TIMEOUT_S", 0.05)
    buffer = open_at(tmp_path, Clock())
    other = sqlite3.connect(tmp_path / "buffer.db", isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    began = time.monotonic()
    with pytest.raises(BufferError, match="database is locked"):
        request(buffer, 1)
    assert time.monotonic() - began < 5.0
    assert buffer.capacity() == 4  # readers wait for nobody
    assert buffer.lease("a", 1, 1.0) == [] and buffer.take(1) is None
    other.execute("ROLLBACK")
    request(buffer, 1)
    other.close()
    buffer.close()


def test_a_fork_must_open_its_own(buffer: SqlBuffer) -> None:
    child = os.fork()
    if child == 0:
        try:
            buffer.capacity()
        except BufferError as error:
            os._exit(0 if "open it again" in str(error) else 2)
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


WORKER = """
import json, sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from buffer_work import rollouts, verdicts
from rlkit.buffer.sql import SqlBuffer
folder, name = Path(sys.argv[2]), sys.argv[3]
deadline = time.monotonic() + 20
buffer = SqlBuffer(f"sqlite:///{folder / 'buffer.db'}", payload_dir=folder / "payloads",
                     prompts_per_step=40, max_staleness=0, slice_samples=2)
(folder / f"{name}.ready").touch()
done = []
while not (folder / "go").exists():
    assert time.monotonic() < deadline
    time.sleep(0.001)
while leases := buffer.lease(name, 3, 60.0):
    for lease in leases:
        buffer.submit_many([(lease, rollouts(lease))])
        buffer.score_many([(lease, verdicts(lease))])
        done.append((lease.ordinal, lease.start, lease.stop))
    time.sleep(0.002)  # sampling takes time; without it one worker could keep the write lock
buffer.close()
print(json.dumps(done))
"""


def test_processes_that_contend_never_get_the_same_slice(tmp_path: Path) -> None:
    """Two workers open the database at the same time, make it, and share 40 groups of 4 samples."""
    here = str(Path(__file__).parent)
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER, here, str(tmp_path), name],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        )
        for name in ("a", "b")
    ]
    try:
        deadline = time.monotonic() + 20
        while not all((tmp_path / f"{name}.ready").exists() for name in ("a", "b")):
            dead = [x.communicate()[1] for x in workers if x.poll() is not None]
            assert not dead and time.monotonic() < deadline, dead
            time.sleep(0.01)
        buffer = open_at(tmp_path, Clock(), prompts=40, staleness=0)
        request(buffer, 40)
        (tmp_path / "go").touch()
        outputs = [x.communicate(timeout=20) for x in workers]
    finally:
        for x in workers:
            x.kill()
            x.wait()
    assert [x.returncode for x in workers] == [0, 0], outputs
    done = [[tuple(x) for x in json.loads(out)] for out, _ in outputs]
    assert all(done), "one worker did everything: nothing was contended"
    covered = sorted((k, i) for work in done for k, a, b in work for i in range(a, b))
    assert covered == [(k, i) for k in range(40) for i in range(4)]
    assert (buffer.stats().expired_leases, buffer.stats().fenced_writes) == (0, 0)
    assert [g.ordinal for g in train(buffer, 40)] == [*range(40)]
    buffer.close()


def test_a_password_is_in_no_message() -> None:
    for url in ("postgres://me:hunter2@db/x", "postgresql//me:hunter2@db"):
        with pytest.raises(BufferError, match=r"\*\*\*@db") as caught:
            parsed(url)
        assert "hunter2" not in str(caught.value)


@pytest.mark.usefixtures("postgresql")
def test_a_server_that_is_cut_off_is_given_up(tmp_path: Path) -> None:
    """By the system's defaults a process that waits for its answer would wait for hours, and beat its pulse."""
    buffer = open_at(tmp_path, Clock())
    with buffer._db.read() as connection:
        raw = connection.connection.driver_connection
        assert raw is not None
        own = socket.socket(fileno=os.dup(raw.fileno()))
    with own:
        limits = [own.getsockopt(socket.IPPROTO_TCP, x) for x in (socket.TCP_KEEPIDLE, socket.TCP_USER_TIMEOUT)]
    assert limits == [30, 90_000]
    buffer.close()
