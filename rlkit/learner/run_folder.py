"""The run folder: made, locked against a second process, and matched with the recipe on resume."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import filelock
import yaml

from rlkit.config.schema import Config
from rlkit.errors import ConfigError
from rlkit.learner.checkpoint import steps

# Keys that may change between two parts of one run: they change neither what is trained nor on what.
FREE_KEYS = (
    "telemetry", "checkpoint", "resume", "output_dir", "name", "steps", "evaluation",
    "reward.workers", "reward.timeout_s", "reward.sandbox", "reward.max_unscored_frac",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class RunFolder:
    """An open, locked run folder."""

    path: Path
    resuming: bool  # there is a checkpoint to go on from

    @property
    def checkpoints(self) -> Path:
        """Folder of step_N checkpoints."""
        return self.path / "checkpoints"


@contextlib.contextmanager
def open_run_folder(config: Config, resolved: Mapping[str, Any]) -> Iterator[RunFolder]:
    """Make or reopen <output_dir>/<name>, write config.yaml, hold the lock.

    Raises ConfigError if the folder cannot be written, is in use, or holds a run of another recipe.
    """
    path = Path(config.output_dir) / config.name
    if config.resume == "never" and path.exists() and any(path.iterdir()):
        with _locked(path):
            places = (path.with_name(f"{path.name}.{number}") for number in itertools.count(1))
            path.rename(next(place for place in places if not place.exists()))
    with _locked(path):
        folder = RunFolder(path, resuming=bool(steps(path / "checkpoints")))
        stored = path / "config.yaml"
        if folder.resuming and stored.exists():
            _match(yaml.safe_load(stored.read_text()), resolved, path)
        stored.write_text(yaml.safe_dump(dict(resolved), sort_keys=False))
        yield folder


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    lock = filelock.FileLock(path / ".lock", timeout=0)
    try:
        path.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except filelock.Timeout as error:
        fix = "wait for that run to end, or set another name"
        raise ConfigError("another process is using this run folder", key="name", value=str(path), fix=fix) from error
    except OSError as error:
        problem = f"the run folder cannot be written: {error.strerror or error}"
        fix = "set output_dir to a folder you can write to"
        raise ConfigError(problem, key="output_dir", value=str(path), fix=fix) from error
    try:
        yield
    finally:
        lock.release()


def _leaves(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Nested mappings -> {"a.b.c": leaf}; an empty mapping is a leaf."""
    if not isinstance(tree, Mapping) or not tree:
        return {prefix: tree}
    return {k: v for key, value in tree.items() for k, v in _leaves(value, f"{prefix}.{key}".lstrip(".")).items()}


def _match(stored: Mapping[str, Any], resolved: Mapping[str, Any], path: Path) -> None:
    before, now = _leaves(stored), _leaves(resolved)
    keys = [k for k in sorted(before.keys() | now.keys()) if before.get(k) != now.get(k)]
    changed = [k for k in keys if not any(f"{k}.".startswith(f"{free}.") for free in FREE_KEYS)]
    if changed:
        key, *others = changed
        more = f" (and {len(others)} more: {', '.join(others[:5])})" if others else ""
        problem = f"{path} holds a run with {key} = {before.get(key)!r}{more}"
        fix = "set another name, or resume=never to move the old run aside"
        raise ConfigError(problem, key=key, value=now.get(key), expected="the run's own recipe", fix=fix)
