"""Errors a user can act on: each names the key, its value, what was expected and how to mend it.

Anything else that escapes rlkit is a bug. The command line prints an `RlkitError` without a traceback and exits with 2.
"""

import contextlib
import difflib
import traceback
from collections.abc import Iterable, Iterator
from typing import ClassVar


class RlkitError(Exception):
    """Base of all errors that are the input's or the environment's, not the code's."""

    passing: ClassVar[bool] = False  # what started the process may start it again: the trouble can be over then

    def __init__(
        self, problem: str, *, key: str | None = None, value: object = None,
        expected: str | None = None, fix: str | None = None,
    ) -> None:  # fmt: skip
        text = problem if key is None else f"{key} = {value!r}: {problem}"
        text += f"\n  expected: {expected}" if expected is not None else ""
        super().__init__(text + (f"\n  to mend:  {fix}" if fix is not None else ""))
        self.problem, self.key, self.value = problem, key, value


class ConfigError(RlkitError):
    """A recipe or an override is wrong."""


class DataError(RlkitError):
    """A data set cannot be used as configured."""


class CheckpointError(RlkitError):
    """A checkpoint is missing, torn or corrupt."""


class BufferError(RlkitError):
    """The versioned buffer refuses an operation (fenced lease, non-monotonic version, ...)."""


class DatabaseError(BufferError):
    """The buffer's database failed: not reachable, too busy, full or damaged."""

    passing = True


class EngineError(RlkitError):
    """An inference engine failed."""

    passing = True


class TrainingError(RlkitError):
    """Training cannot go on (non-finite gradient, no usable group, ...)."""


class Interrupted(RlkitError):
    """SIGINT or SIGTERM arrived; the run was left in a resumable state."""


@contextlib.contextmanager
def calling(component: object, key: str, fix: str = "mend it, or choose a shipped one") -> Iterator[None]:
    """What a component raises in this block becomes a TrainingError naming it, file and line; RlkitErrors pass."""
    try:
        yield
    except (RlkitError, MemoryError):
        raise
    except Exception as error:  # other people's components raise what they like
        if type(error).__name__ == "OutOfMemoryError":  # torch's, which is not imported for this
            raise
        place = traceback.extract_tb(error.__traceback__)[-1]
        problem = f"this component raised {type(error).__name__}: {error} ({place.filename}, line {place.lineno})"
        raise TrainingError(problem, key=key, value=type(component).__name__, fix=fix) from error


def nearest(name: str, candidates: Iterable[str]) -> str:
    """Return " Did you mean 'x'?" for the closest candidate, or "" when none is close."""
    close = difflib.get_close_matches(name, list(candidates), n=1, cutoff=0.6)
    return f" Did you mean {close[0]!r}?" if close else ""
