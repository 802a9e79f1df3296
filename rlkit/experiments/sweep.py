"""`rlkit sweep`: variants x seeds of a recipe, each a run of its own; started again, finished ones are left alone.

Overrides with a comma are swept, as in Hydra: `algorithm=grpo,rloo seed=0,1,2` makes six runs in
<output_dir>/<name>/{grpo,rloo}/seed_{0,1,2}; more values may be added later.
"""

import asyncio
import ctypes
import itertools
import os
import re
import signal
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import filelock

from rlkit.config.compose import load, parsed
from rlkit.config.keys import leaves
from rlkit.config.verify import verify
from rlkit.errors import ConfigError
from rlkit.experiments.compare import FREE
from rlkit.telemetry.record import read_mapping

END_DEADLINE_S = 90.0  # a run that was told to end writes a checkpoint first; it is killed after this


class Run(NamedTuple):
    """One training run of a sweep; what it prints is beside its folder, in seed_<n>.log."""

    title: str  # variant and seed
    folder: Path
    overrides: tuple[str, ...]
    recipe: Mapping[str, Any]  # resolved

    @property
    def finished(self) -> bool:
        """Whether its summary says that every planned step was trained; ConfigError if it was by another recipe."""
        done = int(read_mapping(self.folder / "summary.json").get("steps", -1)) >= int(self.recipe["steps"])
        before, now = leaves(read_mapping(self.folder / "config.yaml")), leaves(self.recipe)
        changed = [key for key in before.keys() | now.keys() if before.get(key) != now.get(key)]
        if done and (wrong := sorted(key for key in changed if key.split(".")[0] not in (*FREE, "steps"))):
            problem = f"{self.folder} is of another sweep, with {wrong[0]} = {before.get(wrong[0])!r}"
            fix = "set another name, or repeat the settings it was begun with, the recipe's file among them"
            raise ConfigError(problem, key=wrong[0], value=now.get(wrong[0]), fix=fix)
        return done


def plan(recipe: str, overrides: Sequence[str], config_dir: Path | None) -> tuple[Path, list[Run]]:
    """The sweep's folder and its runs; every configuration is composed and checked. Raises ConfigError."""
    choices = []
    for text in overrides:  # one of each value of a comma list, else the text itself
        override = parsed(text, sweep=True)
        listed = override.sweep_string_iterator() if override.is_sweep_override() else ()
        choices.append([f"{override.get_key_element()}={value}" for value in listed] or [text])
    swept = [values[0].partition("=")[0] for values in choices if len(values) > 1]
    if fixed := {"name", "output_dir", "resume"} & set(swept):
        raise ConfigError("a sweep has one folder", key=", ".join(sorted(fixed)), value="swept", expected="one value")
    runs: dict[Path, Run] = {}
    for combination in itertools.product(*choices):
        config, _ = load(recipe, combination, config_dir=config_dir)
        verify(config)
        if config.resume == "never":
            fix = "leave it out; set another name for a new sweep"
            raise ConfigError("a sweep goes on with its runs", key="resume", value="never", expected="auto", fix=fix)
        values = dict(text.partition("=")[::2] for text in combination)
        words = [re.sub(r"[^\w.+-]+", "-", values[key]).strip("-") for key in swept if key != "seed"]
        variant, root = "_".join(words) or recipe, Path(config.output_dir) / config.name
        folder = root / variant / f"seed_{config.seed}"
        if folder in runs:
            raise ConfigError("two runs of the sweep have the same folder", key="name", value=str(folder))
        parent = str(folder.parent).replace("\\", "\\\\").replace("'", "\\'")
        given = (*combination, f"output_dir='{parent}'", f"name={folder.name}")
        _, resolved = load(recipe, given, config_dir=config_dir)
        runs[folder] = Run(f"{variant} seed {config.seed}", folder, given, resolved)
    return root, list(runs.values())


def main(recipe: str, overrides: Sequence[str], config_dir: Path | None, jobs: int) -> int:
    """Run a sweep, `jobs` runs at a time; 0 if every run ended well, 1 if one failed, 128 + n after signal n."""
    if jobs < 1:
        raise ConfigError("at least one run at a time", key="--jobs", value=jobs, expected="1 or more")
    root, runs = plan(recipe, overrides, config_dir)
    root.mkdir(parents=True, exist_ok=True)
    if (root / "metrics.jsonl").exists():
        raise ConfigError("this folder holds a run", key="name", value=str(root), fix="set another name for the sweep")
    command = [sys.executable, "-m", "rlkit", "train", f"recipe={recipe}"]
    command += ["--config-dir", str(config_dir)] if config_dir else []
    try:
        with filelock.FileLock(root / ".lock", timeout=0):
            waiting = [run for run in runs if not run.finished]
            print(f"sweep {root}: {len(runs)} runs, {len(runs) - len(waiting)} finished before", flush=True)
            received = asyncio.run(_run_all(waiting, command, jobs))
    except filelock.Timeout as error:
        fix = "wait for it, or set another name"
        raise ConfigError("another process runs this sweep", key="name", value=str(root), fix=fix) from error
    if received:
        print(f"stopped by {signal.Signals(received).name}; the same command goes on")
        return 128 + received
    failed = [run for run in waiting if not run.finished]
    for run in failed:
        log = run.folder.with_suffix(".log")
        tail = log.read_text(errors="replace")[-2000:] if log.exists() else ""
        print(f"{run.title} failed, see {log}:\n{tail}", file=sys.stderr)
    print(f"compare: rlkit compare {root}")
    return 1 if failed else 0


async def _run_all(runs: list[Run], command: list[str], jobs: int) -> int:
    """Train every run; returns the signal that ended it all, or 0."""
    free, received, whole = asyncio.Semaphore(jobs), list[int](), asyncio.current_task()
    assert whole is not None

    def interrupted(number: int) -> None:
        received.append(number)
        whole.cancel()

    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, interrupted, number)

    async def one(run: Run) -> None:
        async with free:
            print(f"{run.title}: started", flush=True)
            status = await _train(run, [*command, *run.overrides], jobs)
        print(f"{run.title}: {'finished' if run.finished else f'failed with status {status}'}", flush=True)

    try:
        async with asyncio.TaskGroup() as group:
            for run in runs:
                group.create_task(one(run))
    except asyncio.CancelledError:
        return received[0]
    return 0


async def _train(run: Run, command: list[str], jobs: int) -> int:
    """Run one to its end, for its exit status; when cancelled, tell it to end and wait until it has."""
    threads = {"OMP_NUM_THREADS": str(max(1, len(os.sched_getaffinity(0)) // jobs))}
    run.folder.mkdir(parents=True, exist_ok=True)
    try:
        # A sweep that was killed has told its runs to end, and one may still be writing a checkpoint. Without a thread:
        # Linux tells children of a parent's death once more for every thread of it.
        async with filelock.AsyncFileLock(run.folder / ".lock", timeout=END_DEADLINE_S, run_in_executor=False):
            pass
    except filelock.Timeout:
        print(f"{run.title}: another process uses {run.folder}", file=sys.stderr)
        return -1
    with run.folder.with_suffix(".log").open("ab") as log:
        process = await asyncio.create_subprocess_exec(
            *command, stdin=asyncio.subprocess.DEVNULL, stdout=log, stderr=asyncio.subprocess.STDOUT,
            env=threads | os.environ, start_new_session=True, preexec_fn=_end_with_parent,
        )  # fmt: skip
    try:
        return await process.wait()
    except asyncio.CancelledError:
        process.terminate()
        try:
            await asyncio.wait_for(process.wait(), END_DEADLINE_S)
        except TimeoutError:
            process.kill()
            await process.wait()
        raise


def _end_with_parent() -> None:
    """In the forked child: SIGTERM when the sweep dies, however it dies (Linux)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)
