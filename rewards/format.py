"""Format reward: the completion has the asked-for shape."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from rewards.base import RewardError, Sample
from rewards.extraction import check_pattern


@dataclass(frozen=True, slots=True)
class Format:
    """1.0 if the completion has the shape, else 0.0.

    pattern: regular expression the whole completion must match (`.` matches newlines too).
    tags: names of tags that must each occur exactly once, in this order, not nested: ["think", "answer"].
    At least one is needed; with both, both must hold.
    """

    bounds = (0.0, 1.0)
    binary = True
    needs_reference = False
    pattern: str = ""
    tags: Sequence[str] = ()

    def __post_init__(self) -> None:
        if not self.pattern and not self.tags:
            raise RewardError("give pattern (a regular expression) or tags (a list of tag names)")
        if isinstance(self.tags, str) or not all(isinstance(tag, str) for tag in self.tags):
            raise RewardError(f"tags={self.tags!r} must be a list of tag names")
        check_pattern("pattern", self.pattern)

    def __call__(self, sample: Sample) -> float:
        if self.pattern and not re.fullmatch(self.pattern, sample.completion, re.DOTALL):
            return 0.0
        wanted = [mark for tag in self.tags for mark in (f"<{tag}>", f"</{tag}>")]
        return float(not wanted or re.findall("|".join(map(re.escape, wanted)), sample.completion) == wanted)
