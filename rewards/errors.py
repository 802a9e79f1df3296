"""Errors of the rewards package."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

__all__ = ["RewardError", "Unscorable", "nearest"]


class RewardError(Exception):
    """A reward, a specification or the verifier pool cannot be used as asked.

    The message names the key, its value, what was expected and how to mend it.
    """


class Unscorable(Exception):
    """Raised by a reward for a sample it cannot judge; the sample's part becomes None.

    Use it where the fault is not the model's (a reference that does not parse, missing
    metadata). A wrong or missing answer is a verdict, usually 0.0, and not this.
    """


def nearest(name: str, valid: Iterable[str]) -> str:
    """`did you mean 'x'?` with the closest valid name, or the whole list if none is close."""
    names = sorted(valid)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    if close:
        return f"did you mean {close[0]!r}?"
    return "valid: " + (", ".join(names) if names else "none")
