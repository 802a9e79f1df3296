"""Errors a user can act on: each names the key, its value, what was expected and how to mend it.

Anything else that escapes rlkit is a bug. The command line prints an `RlkitError` without a
traceback and exits with status 2.
"""

import difflib
from collections.abc import Iterable


class RlkitError(Exception):
    """Base of all errors that are the input's or the environment's, not the code's.

    Example:
        >>> print(RlkitError("one sample per prompt", key="samples_per_prompt", value=1,
        ...                  expected="2 or more", fix="set samples_per_prompt=8"))
        samples_per_prompt = 1: one sample per prompt
          expected: 2 or more
          to mend:  set samples_per_prompt=8
    """

    def __init__(
        self,
        problem: str,
        *,
        key: str | None = None,
        value: object = None,
        expected: str | None = None,
        fix: str | None = None,
    ) -> None:
        head = problem if key is None else f"{key} = {value!r}: {problem}"
        lines = [head]
        if expected is not None:
            lines.append(f"  expected: {expected}")
        if fix is not None:
            lines.append(f"  to mend:  {fix}")
        super().__init__("\n".join(lines))
        self.problem = problem
        self.key = key
        self.value = value


class ConfigError(RlkitError):
    """A recipe or an override is wrong."""


class DataError(RlkitError):
    """A data set cannot be used as configured."""


class CheckpointError(RlkitError):
    """A checkpoint is missing, torn or corrupt."""


class BufferError(RlkitError):
    """The versioned buffer refuses an operation (fenced lease, non-monotonic version, ...)."""


class EngineError(RlkitError):
    """An inference engine failed or disagrees with the learner."""


class TrainingError(RlkitError):
    """Training cannot go on (non-finite gradient, no usable group, ...)."""


class Interrupted(RlkitError):
    """SIGINT or SIGTERM arrived; the run was left in a resumable state."""


def nearest(name: str, candidates: Iterable[str]) -> str:
    """Return " Did you mean 'x'?" for the closest candidate, or "" when none is close."""
    close = difflib.get_close_matches(name, list(candidates), n=1, cutoff=0.6)
    return f" Did you mean {close[0]!r}?" if close else ""
