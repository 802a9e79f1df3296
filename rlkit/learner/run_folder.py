"""The run folder: made, locked against a second process, and matched with the recipe on resume."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import filelock
import yaml

from rlkit.config.schema import Config
from rlkit.errors import ConfigError
from rlkit.learner.checkpoint import steps

# Keys that may change between two parts of one run: they change neither what is trained nor on what.
FREE_KEYS = ("telemetry", "checkpoint", "resume", "output_dir", "name", "steps", "evaluation")
FREE_KEYS_OF_REWARD = ("workers", "timeout_s", "sandbox", "max_unscored_frac")


@dataclass(slots=True)
class RunFolder:
    """An open, locked run folder."""

    path: Path
    resuming: bool
    lock: filelock.BaseFileLock

    @property
    def checkpoints(self) -> Path:
        """Folder of step_N checkpoints."""
        return self.path / "checkpoints"

    def close(self) -> None:
        """Let another process have the folder."""
        self.lock.release()


def open_run_folder(config: Config, resolved: Mapping[str, Any]) -> RunFolder:
    """Make or reopen <output_dir>/<name>, write config.yaml, take the lock.

    Raises ConfigError if the folder cannot be written, is in use, or holds a run of another recipe.
    """
    path = Path(config.output_dir) / config.name
    if config.resume == "never" and path.exists() and any(path.iterdir()):
        with _lock(path):
            path.rename(_free_name(path))
    lock = _lock(path)
    try:
        resuming = bool(steps(path / "checkpoints"))
        stored = path / "config.yaml"
        if resuming and stored.exists():
            _match(yaml.safe_load(stored.read_text()), resolved, path)
        stored.write_text(yaml.safe_dump(dict(resolved), sort_keys=False))
    except BaseException:
        lock.release()
        raise
    return RunFolder(path=path, resuming=resuming, lock=lock)


def _lock(path: Path) -> filelock.BaseFileLock:
    try:
        path.mkdir(parents=True, exist_ok=True)
        lock = filelock.FileLock(path / ".lock", timeout=0)
        lock.acquire()
    except filelock.Timeout as error:
        fix = "wait for that run to end, or set another name"
        raise ConfigError("another process is using this run folder", key="name", value=str(path), fix=fix) from error
    except OSError as error:
        problem = f"the run folder cannot be written: {error.strerror or error}"
        fix = "set output_dir to a folder you can write to"
        raise ConfigError(problem, key="output_dir", value=str(path), fix=fix) from error
    return lock


def _free_name(path: Path) -> Path:
    number = 1
    while (other := path.with_name(f"{path.name}.{number}")).exists():
        number += 1
    return other


def flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Nested mappings -> {"a.b.c": leaf}; an empty mapping is a leaf."""
    if not isinstance(tree, Mapping) or not tree:
        return {prefix: tree}
    out: dict[str, Any] = {}
    for key, value in tree.items():
        out |= flatten(value, f"{prefix}.{key}" if prefix else str(key))
    return out


def _match(stored: Mapping[str, Any], resolved: Mapping[str, Any], path: Path) -> None:
    before, now = flatten(stored), flatten(resolved)
    free = (*FREE_KEYS, *(f"reward.{key}" for key in FREE_KEYS_OF_REWARD))
    changed = [
        key
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key) and not any(key == name or key.startswith(name + ".") for name in free)
    ]
    if changed:
        key = changed[0]
        more = f" (and {len(changed) - 1} more: {', '.join(changed[1:6])})" if changed[1:] else ""
        problem = f"{path} holds a run with {key} = {before.get(key)!r}{more}"
        fix = "set another name, or resume=never to move the old run aside"
        raise ConfigError(problem, key=key, value=now.get(key), expected="the run's own recipe", fix=fix)
