"""Soft penalty on overlong completions."""

from dataclasses import dataclass

from rewards.base import RewardError, Sample


@dataclass(frozen=True, slots=True)
class OverlongPenalty:
    """Soft overlong punishment of DAPO (arXiv 2503.14476, eq. 13), in [-1, 0].

    min(0, max(-1, (max_tokens - cache_tokens - completion_tokens) / cache_tokens)); max_tokens: most tokens a
    completion may have; cache_tokens: length of the soft interval before that, where it falls from 0 to -1.
    """

    bounds = (-1.0, 0.0)
    needs_reference = False
    max_tokens: int
    cache_tokens: int

    def __post_init__(self) -> None:
        if not 0 < self.cache_tokens <= self.max_tokens:
            given = f"cache_tokens={self.cache_tokens!r} and max_tokens={self.max_tokens!r}"
            raise RewardError(f"{given} must satisfy 0 < cache_tokens <= max_tokens")

    def __call__(self, sample: Sample) -> float:
        over = sample.completion_tokens - (self.max_tokens - self.cache_tokens)
        return min(0.0, max(-1.0, -over / self.cache_tokens))
