"""Messages between pool, worker and scoring child: JSON, decoded into typed records."""

from __future__ import annotations

from typing import Any, Literal

import msgspec

from rewards.base import Sample, Score
from rewards.sandbox import Limits, Mode

__all__ = ["Batch", "Failed", "Finished", "Measured", "Outcome", "Ready", "Setup", "decode", "encode"]

Outcome = Literal["returned", "timeout", "crashed"]


class Setup(msgspec.Struct, frozen=True):
    """Pool to worker, once. `isolated`: a child for each sample instead of each batch."""

    spec: dict[str, dict[str, Any]]
    timeout_s: float
    isolated: bool
    sandbox: Mode
    limits: Limits
    read_paths: list[str]
    work_dir: str


class Batch(msgspec.Struct, frozen=True):
    """Pool to worker: samples to score."""

    samples: list[Sample]


class Ready(msgspec.Struct, frozen=True, tag="ready"):
    """Worker to pool: the rewards are warm."""

    files_hidden: bool


class Failed(msgspec.Struct, frozen=True, tag="failed"):
    """Worker to pool: the worker cannot start; `message` is a RewardError's."""

    message: str


class Finished(msgspec.Struct, frozen=True, tag="finished"):
    """Worker to pool: the score of the batch's sample `index`."""

    index: int
    score: Score
    outcome: Outcome


class Measured(msgspec.Struct, frozen=True):
    """Child to worker: untrusted, it comes from where model text was evaluated."""

    index: int
    parts: dict[str, float | None]
    reasons: dict[str, str]
    answer: str | None


encode = msgspec.json.encode
decode = msgspec.json.decode
