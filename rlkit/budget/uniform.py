"""The seam of a budget, and the plainest one."""

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

Outcomes = Sequence[tuple[float, int]]  # (score, tokens) of every scored sample of one group, in sample order
# history(groups): prompt id -> its latest `groups` groups that the learner took, newest first; none: left out. It is
# asked of the database when called, for the prompts in question.
History = Callable[[int], Mapping[str, Sequence[Outcomes]]]


class Budget(Protocol):
    """Splits the samples of a request over its prompts.

    Optional attributes `low` and `high`, a prompt's fewest and most samples: the configuration is checked against them.
    """

    def __call__(self, prompt_ids: Sequence[str], total: int, history: History) -> list[int]:
        """Samples of every prompt, 1 or more each; they sum to `total`. A prompt may be named several times."""


class UniformBudget:
    """total / number of prompts for each; ValueError if `total` does not divide evenly."""

    def __call__(self, prompt_ids: Sequence[str], total: int, history: History) -> list[int]:
        count = len(prompt_ids)
        if count == 0 or total % count:
            raise ValueError(f"total={total}: expected a multiple of {count} prompts")
        return [total // count] * count
