"""`rlkit train`: in this process, or, with `rollout.workers`, as a learner and workers under a supervisor."""

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
from rlkit.launch.supervisor import Part, Supervisor
from rlkit.learner import train

START_TRIES = 5


def main(config: Config, resolved: Mapping[str, Any]) -> int:
    """Returns 0, or 128 + signal number; raises PartFailed when a part cannot go on."""
    if not config.rollout.workers or int(os.environ.get("WORLD_SIZE", "1")) > 1:
        return train.main(config, resolved)
    folder = Path(config.output_dir) / config.name

    def buffer() -> str:
        text = io.StringIO()
        try:
            Console(file=text, width=120).print(inspect.view(folder, time.time()))
        except BufferError as error:
            return str(error)
        return text.getvalue()

    # The parts read the same command line.
    arguments = sys.argv[sys.argv.index("train") + 1 :]
    command = [sys.executable, "-m", "rlkit"]
    parts = [Part(name="learner", command=[*command, "learner", *arguments], vital=True)]
    parts += [Part(name=f"worker-{i}", command=[*command, "worker", *arguments]) for i in range(config.rollout.workers)]
    return asyncio.run(Supervisor(folder, report=buffer).run(parts))
