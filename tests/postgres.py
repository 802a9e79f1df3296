"""A real PostgreSQL server for tests and benchmarks: in a folder, on a free loopback port, ended with the block."""

from __future__ import annotations

import contextlib
import os
import pwd
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path


def binaries() -> Path | None:
    """Folder of initdb and postgres, None where PostgreSQL is not installed."""
    places = [Path(found).resolve().parent for name in ("postgres", "initdb") if (found := shutil.which(name))]
    places += sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)
    return next((place for place in places if (place / "initdb").exists() and (place / "postgres").exists()), None)


def account() -> str | None:
    """Who runs it: PostgreSQL refuses to be root."""
    if os.getuid() != 0:
        return None
    return next(name for name in ("postgres", "nobody") if name in {entry.pw_name for entry in pwd.getpwall()})


@contextlib.contextmanager
def server(folder: Path, host: str = "127.0.0.1", deadline_s: float = 60.0) -> Iterator[str]:
    """URL of a database server without fsync; its files lie in `folder`, which must be reachable by any user."""
    place, user = binaries(), account()
    assert place is not None
    data, log = folder / "data", folder / "postgres.log"
    data.mkdir(parents=True)
    if user is not None:
        shutil.chown(data, user)
    initdb = [place / "initdb", "-D", data, "-U", "rlkit", "-A", "trust", "-E", "UTF8", "--no-sync"]
    subprocess.run(initdb, user=user, check=True, timeout=deadline_s, stdout=subprocess.DEVNULL, cwd=data)
    with (data / "pg_hba.conf").open("a") as trusted:
        trusted.write("host all all all trust\n")
    with contextlib.closing(socket.socket()) as free:
        free.bind((host, 0))
        port = free.getsockname()[1]
    command = [place / "postgres", "-D", data, "-p", str(port), "-c", f"listen_addresses={host}"]
    command += ["-c", "unix_socket_directories=", "-c", "fsync=off", "-c", "max_connections=200"]
    with log.open("wb") as output:
        process = subprocess.Popen(command, user=user, stdout=output, stderr=output, cwd=data, start_new_session=True)
    try:
        deadline = time.monotonic() + deadline_s
        while True:
            with contextlib.suppress(OSError):
                socket.create_connection((host, port), 1).close()
                if "ready to accept connections" in log.read_text():
                    break
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()
            time.sleep(0.05)
        yield f"postgresql://rlkit@{host}:{port}/postgres"
    finally:
        process.terminate()  # "smart": waits for clients
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(5)
        process.kill()
        process.wait(deadline_s)
