"""The seam of a budget: what it is given and what it returns."""

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

Outcomes = Sequence[tuple[float, int]]
"""(score, tokens) of every scored sample of one group, in sample order."""
History = Callable[[int], Mapping[str, Sequence[Outcomes]]]
"""history(groups): prompt id -> its latest `groups` groups that the learner took, newest first; none: left out.

It is asked of the database when called, for the prompts in question."""


class Budget(Protocol):
    """Splits the samples of a request over its prompts.

    Optional attributes `low` and `high`, a prompt's fewest and most samples: the configuration is checked against them.
    """

    def __call__(self, prompt_ids: Sequence[str], total: int, history: History) -> list[int]:
        """Samples of every prompt, 1 or more each; they sum to `total`. A prompt may be named several times."""
