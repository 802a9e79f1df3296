"""The same number of rollouts for every prompt."""

from collections.abc import Sequence
from dataclasses import dataclass

from rlkit.budget.base import History


@dataclass(frozen=True, slots=True)
class UniformBudget:
    """total / number of prompts for each; `total` must divide evenly."""

    def __call__(self, prompt_ids: Sequence[str], total: int, history: History) -> list[int]:
        """len(prompt_ids) equal numbers that sum to `total`; ValueError if they cannot."""
        count = len(prompt_ids)
        if count == 0 or total % count:
            raise ValueError(f"total={total}: expected a multiple of {count} prompts")
        return [total // count] * count
