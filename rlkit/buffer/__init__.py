"""The versioned buffer between rollout workers and learner: protocol.py, docs/buffer.md."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rlkit.buffer.protocol import VersionedBuffer

__all__ = ["open_buffer"]


def open_buffer(
    url: str,
    *,
    payload_dir: str | Path,
    prompts_per_step: int,
    max_staleness: int,
    slice_samples: int,
    clock: Callable[[], float] = time.time,
    keep_payloads: bool = False,
) -> VersionedBuffer:
    """Open the buffer at `url`, made if there is none; see SqlBuffer for arguments and errors."""
    from rlkit.buffer.sql import SqlBuffer

    return SqlBuffer(
        url,
        payload_dir=payload_dir,
        prompts_per_step=prompts_per_step,
        max_staleness=max_staleness,
        slice_samples=slice_samples,
        clock=clock,
        keep_payloads=keep_payloads,
    )
