"""Checkpoints: the only commit point of a run.

    checkpoints/step_40/
        config.json, model.safetensors, tokenizer files     AutoModelForCausalLM.from_pretrained works
        trainer/optimizer.safetensors, rng.safetensors      moments by parameter name, torch generators
        trainer/state.json                                  step, counters, watermark, other RNGs
        manifest.json                                       size and checksum of every file

Written beside its place, flushed, and renamed: there whole or not at all. Nothing is pickled.
"""

import json
import os
import random
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import PreTrainedTokenizerBase

from rlkit.buffer.protocol import Watermark
from rlkit.buffer.snapshots import checksum
from rlkit.errors import CheckpointError
from rlkit.learner.shards import gathered, laid_out_as
from rlkit.learner.update import Learner

MANIFEST = "manifest.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """A verified checkpoint on disk. `watermark` None for a warm start."""

    path: Path
    step: int
    optimizer_steps: int
    seconds: float
    watermark: Watermark | None
    advantage: Mapping[str, float] = field(default_factory=dict)  # the state of one that has any

    def restore(self, learner: Learner) -> None:
        """Optimiser, counter and generators, into a learner whose weights are this checkpoint's already.

        Raises CheckpointError if it belongs to another model.
        """
        by_name, trainer = dict(learner.model.named_parameters()), self.path / "trainer"
        rng = load_file(trainer / "rng.safetensors")
        with safe_open(trainer / "optimizer.safetensors", framework="pt") as optimizer:
            keys = list(optimizer.keys())
            if keys and (unknown := {key.split("/", 1)[1] for key in keys} ^ set(by_name)):
                problem, key = "the optimiser state is of another model", "trainer/optimizer.safetensors"
                expected = "the parameters of this model"
                raise CheckpointError(problem, key=key, value=sorted(unknown)[:3], expected=expected)
            for key in keys:
                (kind, name), tensor = key.split("/", 1), optimizer.get_tensor(key)
                # Step counters stay on the CPU, moments go where the parameter is, or their part of it.
                like = tensor if tensor.ndim == 0 else by_name[name]
                learner.optimizer.state[by_name[name]][kind] = laid_out_as(tensor, like)
        learner.optimizer_steps = self.optimizer_steps
        # Global generators are for users' components; sampling itself is keyed, not drawn.
        (version, internal, gauss), numpy_state = json.loads((trainer / "state.json").read_text())["rng"]
        torch.set_rng_state(rng["cpu"])
        for device in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
            if f"cuda{device}" in rng:  # there may be more devices now, or fewer
                torch.cuda.set_rng_state(rng[f"cuda{device}"], device)
        random.setstate((version, tuple(internal), gauss))
        np.random.set_state(tuple(numpy_state))


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _gather(learner: Learner) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Weights, and moments as "exp_avg/<parameter>" (tied parameters once), whole on rank 0. Collective."""
    moments = {
        f"{key}/{name}": value
        for name, parameter in learner.model.named_parameters()
        for key, value in learner.optimizer.state.get(parameter, {}).items()
    }
    main = learner.accelerator.is_main_process
    return gathered(learner.model.state_dict(keep_vars=True), main), gathered(moments, main)


def save(
    folder: Path, learner: Learner, tokenizer: PreTrainedTokenizerBase, progress: Mapping[str, Any], *, keep: int
) -> None:
    """Write <folder>/step_N atomically and remove all but the newest `keep`; `progress`: fields of a Checkpoint."""
    final, draft = (folder / name.format(progress["step"]) for name in ("step_{}", ".step_{}.tmp"))
    folder.mkdir(parents=True, exist_ok=True)
    for leftover in folder.glob(".step_*.tmp"):
        shutil.rmtree(leftover)
    try:
        trainer = draft / "trainer"
        trainer.mkdir(parents=True)
        weights, moments = learner.together(_gather)
        learner.model.save_pretrained(draft, state_dict=weights)
        tokenizer.save_pretrained(draft)
        cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
        rng = {"cpu": torch.get_rng_state()} | {f"cuda{i}": state for i, state in enumerate(cuda)}
        state = {**progress, "optimizer_steps": learner.optimizer_steps}
        raw = {"state": state, "rng": [random.getstate(), np.random.get_state(legacy=True)]}
        save_file(moments, trainer / "optimizer.safetensors")
        save_file(rng, trainer / "rng.safetensors")
        (trainer / "state.json").write_text(json.dumps(raw, default=np.ndarray.tolist))
        files = sorted(p for p in draft.rglob("*") if p.is_file())
        manifest = {str(p.relative_to(draft)): [p.stat().st_size, checksum(p)] for p in files}
        (draft / MANIFEST).write_text(json.dumps(manifest, indent=1))
        for path in [draft, *draft.rglob("*")]:
            _flush(path)  # so that the rename never outruns the data
        replaced = draft.with_suffix(".replaced.tmp")
        if final.exists():
            final.rename(replaced)
        draft.rename(final)
        _flush(folder)
        shutil.rmtree(replaced, ignore_errors=True)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    for old in steps(folder)[:-keep]:
        shutil.rmtree(folder / f"step_{old}")


def steps(folder: Path) -> list[int]:
    """Steps of the checkpoints in a folder, ascending."""
    names = [p.name.removeprefix("step_") for p in folder.glob("step_*")]
    return sorted(int(name) for name in names if name.isdigit())


def verify(path: Path) -> None:
    """Compare every file with the manifest; CheckpointError names what is wrong and what to do."""
    fix = "start again with resume=never (the run folder is moved aside, not deleted)"
    if others := [f"step_{s}" for s in steps(path.parent) if f"step_{s}" != path.name]:
        fix = f"delete {path} to go on from {path.with_name(others[-1])}"
    wrong = partial(CheckpointError, key="checkpoint", value=str(path), fix=fix)
    try:
        manifest = {name: (size, digest) for name, (size, digest) in json.loads((path / MANIFEST).read_text()).items()}
    except (OSError, ValueError, TypeError, AttributeError) as error:
        expected = f"a complete checkpoint with {MANIFEST}"
        raise wrong(f"the manifest cannot be read: {error}", expected=expected) from error
    for name, (written, digest) in manifest.items():
        size = (path / name).stat().st_size if (path / name).is_file() else None
        if size != written or checksum(path / name) != digest:
            found = "missing" if size is None else f"{size} bytes"
            problem = f"{name} is corrupt ({found}, {written} bytes were written)"
            raise wrong(problem, expected=f"the checksum in {MANIFEST}")


def newest(folder: Path) -> Checkpoint | None:
    """A folder's newest checkpoint, verified, or None if there is none; `from_pretrained(path)` reads its model."""
    if not (found := steps(folder)):
        return None
    path = folder / f"step_{found[-1]}"
    verify(path)
    state = json.loads((path / "trainer" / "state.json").read_text())["state"]
    watermark = state.pop("watermark")
    return Checkpoint(path=path, watermark=Watermark(**watermark) if watermark else None, **state)
