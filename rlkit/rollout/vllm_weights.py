"""New weights for a vLLM server: a plug-in that runs inside the server, and the learner's side for GPUs.

`rlkit_file` loads a safetensors snapshot that server and learner both see; on GPUs vLLM's own `nccl` can broadcast.
vLLM finds `register` through the entry-point group `vllm.general_plugins`, in each of its processes.
"""

import hashlib
import os
import traceback
from dataclasses import dataclass
from pathlib import Path

import xxhash
from safetensors import safe_open
from vllm.distributed.weight_transfer import base, factory
from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload
from vllm.platforms import current_platform


def register() -> None:
    """Entry point: make `--weight-transfer-config '{"backend": "rlkit_file"}'` known. vLLM may call it twice."""
    engines = factory.WeightTransferEngineFactory
    if "rlkit_file" not in engines._registry:
        engines.register_engine("rlkit_file", FileTransferEngine)


@dataclass
class FileInit(base.WeightTransferInitInfo):
    """The folder that snapshots are accepted from; fixed for the life of the server."""

    folder: str


@dataclass
class FileUpdate(base.WeightTransferUpdateInfo):
    """A snapshot and the xxh3-128 (hex) of its bytes."""

    path: str
    checksum: str


def read_shapes(files: list[Path]) -> dict[str, list[int]]:
    """Tensor names and shapes of safetensors files, from their headers."""
    shapes: dict[str, list[int]] = {}
    for file in files:
        with safe_open(file, framework="pt") as tensors:
            shapes |= {name: tensors.get_slice(name).get_shape() for name in tensors.offset_keys()}
    return shapes


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
            if (found := hashlib.file_digest(file, xxhash.xxh3_128).hexdigest()) != update_info.checksum:  # type: ignore[arg-type]
                raise ValueError(f"snapshot {path} is torn or corrupt: xxh3-128 {found}, not {update_info.checksum}")
        served = sorted(Path(self.model_config.model).glob("*.safetensors"))  # none for a name on the hub
        if served and (other := read_shapes([path]).items() ^ read_shapes(served).items()):
            raise ValueError(f"snapshot {path} is of another model, see {sorted(name for name, _ in other)[:3]}")
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
        head = getattr(self.model, "lm_head", None)
        if current_platform.is_cpu() and getattr(self.model.config, "tie_word_embeddings", False) and head is not None:
            dispatch_cpu_unquantized_gemm(head, remove_weight=False)  # packed at load time, and not by the reload above

    def finish_weight_update(self) -> None: ...

    def shutdown(self) -> None: ...
