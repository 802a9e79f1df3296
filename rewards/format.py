"""Format reward: the completion has the asked-for shape."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from rewards.base import RewardError, Sample
from rewards.extraction import check_pattern


@dataclass(frozen=True, slots=True)
class Format:
    """1.0 if the completion has the shape, else 0.0.

    pattern: regular expression the whole completion must match (`.` matches newlines too).
    tags: names of tags that must each occur exactly once, in this order, not nested:
        ["think", "answer"] asks for <think>...</think> ... <answer>...</answer>.
    At least one is needed; with both, both must hold.
    """

    bounds: ClassVar[tuple[float, float]] = (0.0, 1.0)
    binary: ClassVar[bool] = True
    needs_reference: ClassVar[bool] = False
    pattern: str = ""
    tags: Sequence[str] = ()

    def __post_init__(self) -> None:
        if not self.pattern and not self.tags:
            raise RewardError("give pattern (a regular expression) or tags (a list of tag names)")
        if isinstance(self.tags, str) or not all(isinstance(tag, str) for tag in self.tags):
            raise RewardError(f"tags={self.tags!r} must be a list of tag names")
        check_pattern("pattern", self.pattern)

    def __call__(self, sample: Sample) -> float:
        text = sample.completion
        if self.pattern and not re.fullmatch(self.pattern, text, re.DOTALL):
            return 0.0
        position = 0
        for tag in self.tags:
            opening, closing = f"<{tag}>", f"</{tag}>"
            if text.count(opening) != 1 or text.count(closing) != 1:
                return 0.0
            start, end = text.find(opening, position), text.find(closing, position)
            if start < 0 or end < start:
                return 0.0
            position = end + len(closing)
        return 1.0
