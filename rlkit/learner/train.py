"""`rlkit train`: set everything up, run the loop, report. Also `accelerate launch -m rlkit ...`."""

import asyncio
import contextlib
import itertools
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from accelerate.utils import broadcast_object_list

from rlkit.buffer.protocol import Watermark
from rlkit.config.keys import leaves
from rlkit.config.schema import Config
from rlkit.data.prompts import PromptSet
from rlkit.errors import CheckpointError, ConfigError, DataError, Interrupted
from rlkit.learner import checkpoint as checkpoints
from rlkit.learner.likelihood import LikelihoodScorer
from rlkit.learner.loop import Trainer
from rlkit.learner.setup import Session, interruptible, locked, message_of, model_at, open_buffer, open_pool, preflight
from rlkit.learner.sft import start_model
from rlkit.learner.update import Learner, never_stop
from rlkit.rollout.ranks import GenerateOrder, carry_out
from rlkit.telemetry.environment import write_environment
from rlkit.telemetry.record import read_mapping, replace_file
from rlkit.telemetry.report import print_summary, write_report, write_summary
from rlkit.telemetry.rollouts import rollout_steps
from rlkit.telemetry.sinks import Telemetry

START = Watermark(step=0, version=0, next_ordinal=0, refused=0)
LEAVE_S = 60.0  # of an orphaned learner, which writes a checkpoint first
# Keys that may change between two parts of one run: they change neither what is trained nor on what.
FREE_KEYS = (
    "telemetry", "checkpoint", "resume", "output_dir", "name", "steps",
    "evaluation.every_steps", "evaluation.at_start", "evaluation.batch_samples",
    "rollout.workers", "rollout.wait_s", "rollout.verify_every", "rollout.verify_tolerance", "evaluation.engine",
    "learner.processes", "learner.sharded", "rollout.snapshot_dir", "rollout.snapshot_gb",
    "reward.workers", "reward.batch_size", "reward.timeout_s", "reward.sandbox", "reward.max_unscored_frac",
)  # fmt: skip


def main(config: Config, resolved: Mapping[str, Any]) -> int:
    """Train a recipe, workers of other processes aside; returns 0, or 128 + signal number after SIGINT or SIGTERM."""

    def train(check_stop: Callable[[], None]) -> None:
        session = Session.open(config, resolved, check_stop)
        try:
            if not session.accelerator.is_main_process:
                asyncio.run(_follow(session))
                return
            with open_run_folder(config, resolved) as folder:
                _lead(session, folder)
                write_summary(folder)
                if config.telemetry.report:
                    write_report(folder)
                print_summary(folder)
        finally:
            session.accelerator.end_training()

    return interruptible(train)


def _lead(session: Session, folder: Path) -> None:
    """Rank 0. Whatever bad input can break is tried before minutes go into a warm start."""
    write_environment(folder)
    config, previous = session.config, checkpoints.newest(folder / "checkpoints")
    train, held_out = session.prompt_sets()
    sets = {"data.train": train, **{f"data.eval.{name}": prompts for name, prompts in held_out.items()}}
    for name, prompts in sets.items():
        print(message_of(name, len(prompts), prompts.left_out))
        if name != "data.train" and (shared := train.shared_with(prompts)):
            print(f"{name}: {shared} prompts are among the training prompts as well")
    if scorer := LikelihoodScorer.of(session):
        scorer.check(sets)
    _begin(folder, previous, sets)
    with contextlib.ExitStack() as stack:
        if pool := stack.enter_context(open_pool(config.reward)):
            asyncio.run(preflight(pool, train.prompts[:8]))
        broadcast_object_list([str(previous.path) if previous else None], from_process=0)
        learner = _open_learner(session, previous)
        stack.push(_dismiss)
        buffer = stack.enter_context(open_buffer(config))
        report = buffer.rollback(previous.watermark or START if previous else START)
        if report.restored or report.requested_again:
            damage = f", damaged on disk: {', '.join(map(str, report.corrupt))}" if report.corrupt else ""
            print(
                f"buffer: {len(report.restored)} groups go on, {len(report.requested_again)} are sampled again{damage}"
            )
        sinks = Telemetry.open(
            config.telemetry, folder, name=config.name, total_steps=config.steps, config=dict(session.resolved),
            resume_step=previous.step if previous else -1,  # rows beyond are of a lineage that is gone
        )  # fmt: skip
        trainer = Trainer(session, folder, learner, train, held_out, buffer, pool, stack.enter_context(sinks))
        if previous is not None:
            trainer.resume(previous)
            print(f"resuming from {previous.path} (step {previous.step})")
        asyncio.run(trainer.run())


def _begin(folder: Path, previous: checkpoints.Checkpoint | None, sets: Mapping[str, PromptSet]) -> None:
    """Match the data with what the run began on, and remove what an abandoned lineage left behind."""
    place, found = folder / "data.json", {name: prompts.fingerprint() for name, prompts in sets.items()}
    before = read_mapping(place) if previous is not None else {}
    for name, fingerprint in found.items():
        if before.get(name, fingerprint) != fingerprint:
            problem = f"{folder} was trained on other rows of {name}: its ordinals would now name other prompts"
            fix = "bring the data back, or set another name for a new run"
            raise DataError(problem, key=name, value=fingerprint, expected=str(before[name]), fix=fix)
    replace_file(place, json.dumps(found, indent=1).encode())
    (folder / "summary.json").unlink(missing_ok=True)
    for step in rollout_steps(folder):
        if previous is None or step > previous.step:
            (folder / "rollouts" / f"step_{step}.parquet").unlink()


def _dismiss(kind: type[BaseException] | None, *_: object) -> None:
    """End the other ranks, unless rank 0 fails: they may be in a collective then, and the launcher ends them."""
    if kind is None or issubclass(kind, Interrupted):
        broadcast_object_list([None], from_process=0)


async def _follow(session: Session) -> None:
    """Ranks other than 0: sample a share, train, or gather weights, as rank 0 orders, until it sends None."""
    config, accelerator = session.config, session.accelerator
    chosen = broadcast_object_list([None], from_process=0)[0]
    newest = checkpoints.newest(Path(config.output_dir) / config.name / "checkpoints") if chosen else None
    if chosen and (newest is None or str(newest.path) != chosen):
        problem, fix = "this rank does not see the checkpoint rank 0 goes on from", "put output_dir on a shared disk"
        raise CheckpointError(problem, key="output_dir", value=config.output_dir, expected=chosen, fix=fix)
    learner = _open_learner(session, newest)
    engine = None if config.rollout.workers else session.engine(learner.model)
    while (message := broadcast_object_list([None], from_process=0)[0]) is not None:
        if isinstance(message, GenerateOrder) and engine is not None:
            await carry_out(message, engine, accelerator.process_index, accelerator.num_processes)
        elif callable(message):
            message(learner)  # see Learner.together
        else:
            learner.step(message, never_stop)


def _open_learner(session: Session, previous: checkpoints.Checkpoint | None) -> Learner:
    """The learner at the start of the run, or at its newest checkpoint."""
    start = start_model(session)
    learner = session.learner(start if previous is None else model_at(start, previous.path), start)
    if previous is not None:
        previous.restore(learner)
    return learner


def move_aside(config: Config) -> None:
    """With resume=never: an existing run folder gets another name. ConfigError while a process uses it."""
    path = Path(config.output_dir) / config.name
    if config.resume == "never" and path.exists() and any(path.iterdir()):
        with locked(path, busy(path), key="output_dir"), locked(path / "logs", busy(path), key="output_dir"):
            places = (path.with_name(f"{path.name}.{number}") for number in itertools.count(1))
            path.rename(next(place for place in places if not place.exists()))
    if config.resume == "never" and config.buffer.url:  # it has not moved with the folder
        with open_buffer(config) as buffer:
            buffer.forget()


def busy(path: Path) -> ConfigError:
    """Two runs in one folder."""
    fix = "wait for that run to end, or set another name"
    return ConfigError("another process is using this run folder", key="name", value=str(path), fix=fix)


@contextlib.contextmanager
def open_run_folder(config: Config, resolved: Mapping[str, Any]) -> Iterator[Path]:
    """Make or reopen <output_dir>/<name>, write config.yaml, hold the lock; ConfigError for one of another recipe."""
    path = Path(config.output_dir) / config.name
    move_aside(config)
    # Of a supervised run only one whose supervisor was killed a moment ago can be in the way: it is about to go.
    with locked(path, busy(path), key="output_dir", wait_s=LEAVE_S if config.rollout.workers else 0.0):
        stored = path / "config.yaml"
        begun, other = bool(checkpoints.steps(path / "checkpoints")), not stored.exists()
        try:
            _match(read_mapping(stored), resolved, path)
        except ConfigError:
            if begun:
                raise
            other = True
        if other and not begun:
            with open_buffer(config) as buffer:
                if (step := buffer.stats().step) and not stored.exists():
                    problem = f"the database holds a run of this name, at step {step}, that is not of this folder"
                    fix = "set another name, or resume=never to begin anew in its place"
                    raise ConfigError(problem, key="name", value=config.name, fix=fix)
                buffer.forget()  # what another recipe sampled and scored
        replace_file(stored, yaml.safe_dump(dict(resolved), sort_keys=False).encode())
        yield path


def same_recipe(path: Path, resolved: Mapping[str, Any]) -> None:
    """ConfigError where a run folder's checkpoints are of another recipe."""
    if checkpoints.steps(path / "checkpoints"):
        _match(read_mapping(path / "config.yaml"), resolved, path)


def _match(stored: Mapping[str, Any], resolved: Mapping[str, Any], path: Path) -> None:
    before, now = leaves(stored), leaves(resolved)
    changed = (k for k in sorted(before.keys() | now.keys()) if before.get(k) != now.get(k))
    key, *others = [k for k in changed if not f"{k}.".startswith(tuple(f"{free}." for free in FREE_KEYS))] or [""]
    if key:
        more = f" (and {len(others)} more: {', '.join(others[:5])})" if others else ""
        problem = f"{path} holds a run with {key} = {before.get(key)!r}{more}"
        fix = "set another name, or resume=never to move the old run aside"
        raise ConfigError(problem, key=key, value=now.get(key), expected="the run's own recipe", fix=fix)
