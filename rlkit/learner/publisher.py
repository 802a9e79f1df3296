"""Weights for engines in other processes: one copy holds up the learner, a thread writes the file and lists it."""

import asyncio
import contextlib
from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor, nn

from rlkit.buffer.snapshots import Snapshot, checksum
from rlkit.buffer.sql import SqlBuffer
from rlkit.errors import TrainingError


@dataclass(slots=True)
class Publisher:
    """Keeps <folder>/v<version>.safetensors of the versions that are needed, at most `most_gb` (1e9 bytes) of them."""

    buffer: SqlBuffer
    folder: Path
    most_gb: float
    _writing: asyncio.Task[None] | None = None

    async def publish(self, version: int, model: nn.Module) -> None:
        """Serve the present weights as `version`; waits only for the file of the version before. Raises as `done`."""
        await self.done()
        # Tied parameters are named once, which loaders of tied models expect.
        tensors = {name: p.detach().to("cpu", copy=True).contiguous() for name, p in model.named_parameters()}
        self._writing = asyncio.create_task(asyncio.to_thread(self._write, version, tensors))

    async def done(self) -> None:
        """Wait for the last file. Raises what went wrong: TrainingError over the cap, OSError of a full disk."""
        writing, self._writing = self._writing, None
        if writing is not None:
            await writing

    def _write(self, version: int, tensors: dict[str, Tensor]) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        for snapshot in self.buffer.discard():
            Path(snapshot.path).unlink(missing_ok=True)
        size = sum(tensor.nbytes for tensor in tensors.values())
        held = sum(path.stat().st_size for path in self.folder.glob("v*.safetensors"))
        if held + size > self.most_gb * 1e9:
            problem = f"untrained samples still need {held / 1e9:.3g} GB of snapshots, and {size / 1e9:.3g} GB come"
            fix = "raise it, lower max_staleness, or put rollout.snapshot_dir on a larger disk"
            raise TrainingError(problem, key="rollout.snapshot_gb", value=self.most_gb, fix=fix)
        final, draft = self.folder / f"v{version}.safetensors", self.folder / f".v{version}.tmp"
        try:
            save_file(tensors, draft)
            found = Snapshot(version=version, path=str(final), checksum=checksum(draft), size=draft.stat().st_size)
            draft.replace(final)
        finally:
            with contextlib.suppress(OSError):
                draft.unlink(missing_ok=True)
        self.buffer.stored(found)
