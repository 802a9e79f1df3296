"""New weights for vLLM servers: a plug-in that runs inside the server, and the learner's side for GPUs.

`rlkit_file` loads a safetensors snapshot that server and learner both see; on GPUs vLLM's own `nccl` can broadcast.
vLLM finds `register` through the entry-point group `vllm.general_plugins`, in each of its processes.
"""

import hashlib
import os
import socket
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import torch
import xxhash
from safetensors import safe_open
from vllm.distributed.weight_transfer import base, factory
from vllm.distributed.weight_transfer.clients import HTTPVLLMWeightSyncClient
from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo
from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload
from vllm.platforms import current_platform


def register() -> None:
    """Make the backend `rlkit_file` known to vLLM, which may call this twice in a process."""
    if "rlkit_file" not in factory.WeightTransferEngineFactory._registry:
        factory.WeightTransferEngineFactory.register_engine("rlkit_file", FileTransferEngine)


@dataclass
class FileInit(base.WeightTransferInitInfo):
    folder: str  # where snapshots are accepted from; fixed for the life of the server


@dataclass
class FileUpdate(base.WeightTransferUpdateInfo):
    path: str  # a safetensors file
    checksum: str  # xxh3-128 of its bytes, hex


def shapes(*files: Path) -> set[tuple[str, tuple[int, ...]]]:
    """Names and shapes of the tensors of safetensors files, from their headers."""
    found = set()
    for file in files:
        with safe_open(file, framework="pt") as tensors:
            found |= {(name, tuple(tensors.get_slice(name).get_shape())) for name in tensors.offset_keys()}
    return found


class FileTransferEngine(base.WeightTransferEngine[FileInit, FileUpdate]):
    """Everything is checked before the first tensor is touched: a refused snapshot leaves the old weights serving."""

    init_info_cls, update_info_cls = FileInit, FileUpdate
    folder: Path | None = None

    def init_transfer_engine(self, init_info: FileInit) -> None:
        folder = Path(init_info.folder).resolve(strict=True)
        if self.folder not in (None, folder):
            raise ValueError(f"snapshots come from {self.folder}, not from {folder}: restart the server to change that")
        self.folder = folder

    def start_weight_update(self) -> None: ...

    def receive_weights(self, update_info: FileUpdate) -> None:
        path = Path(update_info.path).resolve(strict=True)
        if self.folder is None or not path.is_relative_to(self.folder):
            raise ValueError(f"snapshot {path} is not inside the snapshot folder {self.folder}")
        with path.open("rb") as file:
            found = hashlib.file_digest(file, xxhash.xxh3_128).hexdigest()  # type: ignore[arg-type]
        if found != update_info.checksum:
            raise ValueError(f"snapshot {path} is torn or corrupt: xxh3-128 {found}, not {update_info.checksum}")
        served = Path(self.model_config.model).glob("*.safetensors")  # none for a name on the hub
        if (expected := shapes(*served)) and (other := expected ^ shapes(path)):
            raise ValueError(f"snapshot {path} is of another model, see {sorted(other)[:2]}")
        try:
            self._load(path)
        except BaseException:
            traceback.print_exc()
            os._exit(70)  # half of the weights are new: this server must not sample another token

    def _load(self, path: Path) -> None:
        initialize_layerwise_reload(self.model)
        with safe_open(path, framework="pt") as tensors:
            loaded = self.model.load_weights((name, tensors.get_tensor(name)) for name in tensors.offset_keys())
        finalize_layerwise_reload(self.model, self.model_config)
        if missing := {name for name, _ in self.model.named_parameters()} - set(loaded or ()):
            raise ValueError(f"no tensor of {path} was loaded into {sorted(missing)[:3]}")
        if current_platform.is_cpu() and getattr(self.model.config, "tie_word_embeddings", False):
            # The head is packed when a model is loaded; the reload above leaves the old one in place.
            dispatch_cpu_unquantized_gemm(self.model.lm_head, remove_weight=False)

    def finish_weight_update(self) -> None: ...

    def shutdown(self) -> None: ...


class _Source(base.ModuleSource):
    """A model's tensors as the learner hands them over, one pass at a time."""

    tensors: Iterator[tuple[str, torch.Tensor]]

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        return self.tensors


class NcclSender:
    """The learner's side of `nccl` to one server, on rank 0 (`rlkit.learner.broadcast`; not run on GPUs so far)."""

    def __init__(self, url: str, model: torch.nn.Module, timeout_s: float) -> None:
        """Meet the server's processes, at an address of this machine that it can reach."""
        self.url, self.timeout_s, self.source, place = url, timeout_s, _Source(model), urlsplit(url)
        with socket.create_connection((place.hostname, place.port), timeout_s) as link, socket.socket() as free:
            free.bind((link.getsockname()[0], 0))
            address, port = free.getsockname()
        answer = httpx.get(f"{url}/get_world_size", timeout=timeout_s).raise_for_status()
        info = NCCLTrainerInitInfo(address, port, 1 + answer.json()["world_size"], rank=0)
        client = HTTPVLLMWeightSyncClient(url, timeout_s)
        self.engine = factory.WeightTransferTrainerFactory.trainer_init(info, client=client, source=self.source)

    def send(self, version: int, tensors: Iterator[tuple[str, torch.Tensor]]) -> None:
        """Serve them as `version`; requests under way are held meanwhile, and go on under them."""
        self.source.tensors = tensors
        torch.cuda.synchronize()  # they are read on streams of vLLM's
        self._post("/pause?mode=keep")
        try:
            self.engine.send_weights()
            self._post("/update_weight_version", {"new_version": str(version)})
        finally:
            self._post("/resume")

    def close(self) -> None:
        """Abort what is under way."""
        self.engine.shutdown()

    def _post(self, path: str, body: Any = None) -> None:
        httpx.post(f"{self.url}{path}", json=body, timeout=self.timeout_s).raise_for_status()
