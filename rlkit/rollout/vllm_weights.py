"""New weights for vLLM servers: a plug-in that runs inside the server, and the learner's side for GPUs.

`rlkit_file` loads a safetensors snapshot that server and learner both see; on GPUs vLLM's own `nccl` can broadcast.
vLLM finds `register` through the entry-point group `vllm.general_plugins`, in each of its processes.
"""

import hashlib
import os
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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

from rlkit.errors import EngineError


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


class Broadcast:
    """The learner's side of `nccl`, made and used by all its ranks at the same time (not run on GPUs so far).

    Each tensor of `model` (FSDP2 shards or whole) is gathered on all ranks, sent by rank 0 to one server after the
    other, and freed before the next: no rank ever holds the whole model.
    """

    def __init__(self, model: torch.nn.Module, urls: list[str], rank: int, address: str, first_port: int) -> None:
        if not torch.cuda.is_available():
            raise EngineError("needs a GPU", key="weight_transfer", value="nccl", fix="weight_transfer=rlkit_file")
        source, self.rank, self.senders = base.ModuleSource(model), rank, dict[str, Any]()
        for port, url in enumerate(urls, first_port):
            workers = httpx.get(f"{url}/get_world_size").raise_for_status().json()["world_size"]
            info, client = NCCLTrainerInitInfo(address, port, 1 + workers, rank=rank), HTTPVLLMWeightSyncClient(url)
            self.senders[url] = factory.WeightTransferTrainerFactory.trainer_init(info, client=client, source=source)

    def publish(self, version: int, timeout_s: float = 600.0) -> None:
        """Serve the model's weights as `version`; requests under way are held meanwhile, and go on under them."""
        for url, sender in self.senders.items():
            self._post(f"{url}/pause?mode=keep", timeout_s)
            try:
                sender.send_weights()
                self._post(f"{url}/update_weight_version", timeout_s, {"new_version": str(version)})
            finally:
                self._post(f"{url}/resume", timeout_s)

    def _post(self, url: str, timeout_s: float, body: Any = None) -> None:
        if self.rank == 0:
            httpx.post(url, json=body, timeout=timeout_s).raise_for_status()
