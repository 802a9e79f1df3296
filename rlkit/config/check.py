"""`rlkit check`: the resolved configuration, what follows from it, and the memory it will need."""

from __future__ import annotations

from typing import Any

from omegaconf import OmegaConf

from rlkit.config.derive import batch_table
from rlkit.config.memory import estimate
from rlkit.config.schema import Config
from rlkit.config.verify import verify
from rlkit.errors import ConfigError


def main(config: Config, raw: dict[str, Any]) -> int:
    """Print configuration, batch table and memory estimate; start nothing.

    Raises ConfigError naming every problem (the command line exits with status 2). A hub model
    whose config is out of reach only costs the memory estimate.
    """
    verify(config)
    print(OmegaConf.to_yaml(OmegaConf.create(raw)))
    print("Derived from it")
    for row in batch_table(config):
        print(f"  {row.name:<44} {row.value:>14,}   {row.how}")
    print("\nMemory of one learner process, estimated")
    for line in memory_lines(config):
        print(line)
    print("\nNothing was started. The configuration is valid.")
    return 0


def memory_lines(config: Config) -> list[str]:
    """The memory estimate as lines of a table."""
    try:
        parts = estimate(config)
    except ConfigError as error:
        if config.model.architecture is not None:
            raise
        return [f"  not known: {error}"]
    lines = [f"  {part.name:<44} {size(part.bytes):>14}   {part.how}" for part in parts]
    return [*lines, f"  {'together':<44} {size(sum(part.bytes for part in parts)):>14}"]


def size(count: int) -> str:
    """Bytes for a reader: 512 B, 1.5 MB, 24.0 GB (powers of 1000)."""
    if count < 1000:
        return f"{count} B"
    value = float(count)
    for unit in ("kB", "MB", "GB"):
        value /= 1000
        if value < 1000:
            return f"{value:.1f} {unit}"
    return f"{value / 1000:.1f} TB"
