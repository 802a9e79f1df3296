"""What a reward sees, what comes back, and what may go wrong."""

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any


class RewardError(Exception):
    """A reward, a specification or the verifier pool cannot be used as asked; says what to mend."""


class Unscorable(Exception):
    """Raised by a reward for a sample it cannot judge; the sample's part becomes None.

    Use it where the fault is not the model's (a reference that does not parse, missing metadata). A wrong or missing
    answer is a verdict, usually 0.0, and not this.
    """


@dataclass(frozen=True, slots=True)
class Sample:
    """One completion to judge."""

    prompt: str  # as rendered
    completion: str  # decoded, special tokens removed
    reference: str | None  # the gold answer, if there is one
    metadata: Mapping[str, Any]  # JSON-able values of the data set row
    finish_reason: str  # "stop" or "length"
    completion_tokens: int
    key: str = ""  # its place in the run, "<prompt's ordinal>/<sample>", if it has one


@dataclass(frozen=True, slots=True)
class Score:
    """The verdict on one sample."""

    score: float | None  # weighted sum of the parts; None: could not be scored (drop and count it; it is never 0)
    parts: Mapping[str, float | None]  # a value for each named reward, None where it gave none
    answer: str | None  # extracted, for majority voting; in canonical form where the reward knows one
    reason: str | None  # why a part is None, also beside a score if the part has weight 0 (docs/rewards.md lists them)
    seconds: float  # wall-clock time spent on the sample, measured outside the sandbox


def nearest(name: str, valid: Iterable[str]) -> str:
    """`did you mean 'x'?` with the closest valid name, or the whole list if none is close."""
    names = sorted(valid)
    if close := difflib.get_close_matches(name, names, n=1, cutoff=0.5):
        return f"did you mean {close[0]!r}?"
    return "valid: " + (", ".join(names) or "none")
