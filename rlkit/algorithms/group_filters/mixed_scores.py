"""DAPO's dynamic sampling (Yu et al. 2025, arXiv 2503.14476, section 3.2): only groups with unequal scores."""

from torch import Tensor


class MixedScores:
    """Keep a group whose scores are not all equal."""

    def __call__(self, scores: Tensor) -> bool:
        """scores [n] of one group's scored samples, n >= 1."""
        return bool((scores != scores[0]).any())
