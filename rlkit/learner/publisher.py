"""Weights for engines in other processes: one copy holds up the learner, a thread writes the file and lists it."""

import asyncio
import contextlib
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeAlias

from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from rlkit.buffer.snapshots import Snapshot, checksum
from rlkit.buffer.sql import SqlBuffer
from rlkit.errors import TrainingError
from rlkit.learner.shards import gathered
from rlkit.learner.update import Learner
from rlkit.types import IntArray

Probe: TypeAlias = tuple[list[int], list[float]]  # tokens, and log-probs of all but the first
ARCHITECTURE = "architecture"  # folder beside the snapshots: config.json, for servers that make the model themselves


def _gather(learner: Learner, probe: IntArray | None) -> tuple[dict[str, Tensor], Probe | None]:
    """Weights, whole on rank 0, and what they make of the probe. Collective."""
    scored = None if probe is None else (probe.tolist(), learner.unwrapped.probe(probe).tolist())
    # Tied parameters are named once, which loaders of tied models expect.
    return gathered(dict(learner.model.named_parameters()), learner.accelerator.is_main_process), scored


@dataclass(slots=True)
class Publisher:
    """Keeps <folder>/v<version>.safetensors of the versions that are needed, at most `most_gb` (1e9 bytes) of them."""

    buffer: SqlBuffer
    folder: Path
    most_gb: float
    _writing: asyncio.Future[None] | None = None

    def prepare(self, model: PreTrainedModel) -> None:
        """Make the folder, with the model's config.json, and remove what a killed learner left there unlisted."""
        model.config.save_pretrained(self.folder / ARCHITECTURE)
        listed = self.buffer.listed()
        for path in [*self.folder.glob("v*.safetensors"), *self.folder.glob(".*tmp*")]:
            if str(path) not in listed:
                path.unlink()

    async def publish(self, version: int, learner: Learner, probe: IntArray | None = None) -> None:
        """Serve the present weights as `version`; waits only for the file of the version before. Raises as `done`.

        `probe`: tokens to compare engines with the learner on.
        """
        await self.done()
        tensors, scored = learner.together(partial(_gather, probe=probe))
        # A task would begin when the event loop is next idle, which is after the next step's training.
        self._writing = asyncio.get_running_loop().run_in_executor(None, self._write, version, tensors, scored)

    async def done(self) -> None:
        """Wait for the last file. Raises what went wrong: TrainingError over the cap, OSError of a full disk."""
        writing, self._writing = self._writing, None
        if writing is not None:
            await writing

    def _write(self, version: int, tensors: dict[str, Tensor], probe: Probe | None) -> None:
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
            found = Snapshot(
                version=version, path=str(final), checksum=checksum(draft), size=draft.stat().st_size, probe=probe
            )
            draft.replace(final)
        finally:
            with contextlib.suppress(OSError):
                draft.unlink(missing_ok=True)
        self.buffer.stored(found)
