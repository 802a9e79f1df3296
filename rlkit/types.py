"""The data model: what travels between data set, buffer, engine, verifier and learner.

All classes are frozen and slotted; arrays are numpy, one-dimensional, and read-only by convention.
T = number of generated tokens of one rollout.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

import numpy as np
from numpy.typing import NDArray

IntArray = NDArray[np.int64]
FloatArray = NDArray[np.float32]
BoolArray = NDArray[np.bool_]


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """One task, rendered and tokenised."""

    id: str  # e.g. "chain_sum/17"
    text: str
    token_ids: IntArray  # [prompt tokens]
    reference: str | None
    metadata: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class VersionSpan:
    """Tokens [start, end) of a rollout were sampled under policy version `version`."""

    version: int
    start: int
    end: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Rollout:
    """One sampled completion, as the engine reported it. Single-turn work has loss_mask all True and segments all 0."""

    ordinal: int  # position of its group in the run's prompt order (unique in a run)
    index: int  # which of the group's samples this is, 0 <= index < samples
    token_ids: IntArray  # [T] sampled tokens, the stop token included when there is one
    # [T] in nats, under the sampling distribution (temperature applied) of the policy that sampled the token
    behavior_logprobs: FloatArray
    loss_mask: BoolArray  # [T] False where a token was not the policy's own (tool output)
    segments: IntArray  # [T] turn number of each token
    version_spans: tuple[VersionSpan, ...]  # cover [0, T) in order; two where the weights changed while it was sampled
    finish_reason: str  # "stop" (stop token or stop string) or "length"
    engine_id: str
    text: str

    def versions(self) -> IntArray:
        """Policy version of every token, [T]."""
        each = [span.version for span in self.version_spans for _ in range(span.start, span.end)]
        return np.array(each, dtype=np.int64)


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What the verifiers said of one rollout."""

    score: float | None  # None: it could not be scored (timeout, crash, NaN); dropped and counted, never treated as 0
    parts: Mapping[str, float | None] = field(default_factory=dict)
    answer: str | None = None  # extracted, for majority voting
    reason: str | None = None


class GroupState(StrEnum):
    """Life of a group: REQUESTED -> LEASED -> GENERATED -> SCORED -> TAKEN -> TRAINED | DROPPED."""

    REQUESTED = "requested"
    LEASED = "leased"
    GENERATED = "generated"
    SCORED = "scored"
    TAKEN = "taken"
    TRAINED = "trained"
    DROPPED = "dropped"


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """All samples of one prompt, complete and scored; rollouts and verdicts align by index."""

    ordinal: int
    prompt: Prompt
    samples: int
    rollouts: tuple[Rollout, ...]
    verdicts: tuple[Verdict, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How tokens are drawn. No truncation (top-k, top-p, min-p): it would bias the ratio."""

    temperature: float  # > 0, or 0 for greedy decoding (evaluation only)
    max_tokens: int
    seed: int  # with (prompt ordinal, sample index, token position) it fixes every draw
    stop_token_ids: tuple[int, ...]  # generation ends after one of these (it stays in the rollout)
    stop_strings: tuple[str, ...] = ()  # or when the decoded completion contains one of these
