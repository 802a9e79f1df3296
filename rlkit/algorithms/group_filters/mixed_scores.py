"""DAPO's dynamic sampling (Yu et al. 2025, arXiv 2503.14476, section 3.2): only groups with unequal scores.

A group whose samples all have the same score has advantage 0 for every group-relative method: it takes a place
in the step and gives no gradient. Such a group is dropped and the next prompt takes its place, so that every
step has `prompts_per_step` groups that teach something.
"""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True)
class MixedScores:
    """Keep a group whose scores are not all equal."""

    def __call__(self, scores: Tensor) -> bool:
        """scores [n] of one group's scored samples, n >= 1."""
        return bool((scores != scores[0]).any())
