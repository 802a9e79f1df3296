"""`rlkit workers`: `rollout.workers` workers on this machine, for a learner that runs on another one."""

from collections.abc import Mapping
from typing import Any

from rlkit.config.schema import Config
from rlkit.launch.run import supervise, worker_parts


def main(config: Config, resolved: Mapping[str, Any], arguments: list[str]) -> int:
    """Until all of them have ended well, which they do when the run has; raises PartFailed when one cannot go on."""
    return supervise(config, worker_parts(config, arguments))
