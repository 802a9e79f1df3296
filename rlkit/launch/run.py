"""`rlkit train`: in this process or, with `rollout.workers`, as a learner, workers and an evaluator, supervised."""

import asyncio
import io
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console

from rlkit.buffer import inspect
from rlkit.config.schema import Config
from rlkit.errors import BufferError
from rlkit.launch.devices import assign
from rlkit.launch.supervisor import Part, Supervisor
from rlkit.launch.worker import process_name
from rlkit.learner import train
from rlkit.learner.setup import locked, open_buffer

COMMAND = (sys.executable, "-m", "rlkit")


def main(config: Config, resolved: Mapping[str, Any], arguments: list[str]) -> int:
    """Returns 0, or 128 + signal number; raises PartFailed when a part cannot go on.

    `arguments`: the command line behind "train". The parts read it too.
    """
    if not config.rollout.workers or int(os.environ.get("WORLD_SIZE", "1")) > 1:
        return train.main(config, resolved)
    # A part that is started again goes on, whatever resume says.
    train.move_aside(config)
    train.same_recipe(Path(config.output_dir) / config.name, resolved)
    ranks = config.learner.processes
    learner = [sys.executable, "-m", "rlkit.launch.ranks", str(ranks)] if ranks > 1 else COMMAND
    parts = [Part(name="learner", command=[*learner, "learner", *arguments, "resume=auto"], vital=True)]
    parts += worker_parts(config, arguments)
    if config.data.eval:
        parts.append(Part(name="evaluator", command=[*COMMAND, "evaluator", *arguments, "resume=auto"]))
    folder = Path(config.output_dir) / config.name
    with locked(folder / "logs", train.busy(folder), key="output_dir"):
        return supervise(config, parts)


def worker_parts(config: Config, arguments: list[str]) -> list[Part]:
    """This machine's workers."""
    command = [*COMMAND, "worker", *arguments, "resume=auto"]
    return [Part(name=f"worker-{i}", command=command) for i in range(config.rollout.workers)]


def supervise(config: Config, parts: list[Part]) -> int:
    """Run parts to their end; what is wrong is reported with the buffer's state."""
    folder = Path(config.output_dir) / config.name

    def buffer() -> str:
        text = io.StringIO()
        try:
            Console(file=text, width=120).print(inspect.view(folder, time.time()))
        except BufferError as error:
            return str(error).partition("\n")[0]  # in a run that has hardly begun there is none
        return text.getvalue()

    def give_back(pid: int) -> str:
        try:
            with open_buffer(config) as opened:
                count = opened.release_all(process_name("worker", pid))
        except (BufferError, OSError) as error:
            return f"its leases, if any, stay until they expire: {error}"
        return f"{count} slices that it held are given back" if count else ""

    parts = assign(config, parts)
    return asyncio.run(Supervisor(folder, report=buffer, crashed=give_back).run(parts))
