"""Mathematical equality of answer and reference, through the math-verify library."""

import functools
import itertools
import logging
import re
from dataclasses import dataclass
from typing import Any

from rewards.base import RewardError, Sample, Unscorable
from rewards.extraction import check_extraction, extract

_PERCENT = re.compile(r"\s*\\?%")
_MAX_ANSWER_CHARS = 500


@dataclass(frozen=True, slots=True)
class MathVerify:
    """1.0 if the answer equals the reference as mathematics, else 0.0; no answer found is 0.0.

    extract, marker: where the answer stands (docs/rewards.md); strict: variables must carry the same names, and a set
    is not a tuple. The reference is a plain number or LaTeX, with or without dollar signs or a box. One that does not
    parse makes the sample unscorable, and so does an exception raised in the comparison. math-verify's own time limits
    are off (SIGALRM does not interrupt C code): call this through `VerifierPool`, which keeps the time.
    """

    bounds = (0.0, 1.0)
    binary = True
    extract: str = "boxed"
    marker: str = ""
    strict: bool = True

    def __post_init__(self) -> None:
        check_extraction(self.extract, self.marker, more=("auto",))

    def warm_up(self) -> None:
        """Import sympy, build math-verify's expressions and its LaTeX parser's tables."""
        if self._compare(_parse_alone(r"\frac{1}{2}"), _parse(r"\boxed{\frac{1}{2}} and \boxed{0.5}")) != 1.0:
            raise RewardError("math-verify does not find 0.5 equal to 1/2; is it installed whole?")

    def __call__(self, sample: Sample) -> float:
        if sample.reference is None:
            raise Unscorable("no reference")
        gold = [item for item in _parse_alone(sample.reference) if not isinstance(item, str)]
        if not gold:
            raise Unscorable(f"reference {sample.reference!r} does not parse as mathematics")
        return self._compare(gold, self._parsed(sample))

    def answer(self, sample: Sample) -> str | None:
        """The extracted answer as sympy prints it, so that 1/2 and \\frac12 are the same vote."""
        parsed = self._parsed(sample)
        return str(parsed[0])[:_MAX_ANSWER_CHARS] if parsed else None

    def _parsed(self, sample: Sample) -> list[Any]:
        if self.extract == "auto":
            return _parse(sample.completion)
        found = extract(sample.completion, self.extract, self.marker)
        return [] if found is None else _parse_alone(found)

    def _compare(self, gold: list[Any], target: list[Any]) -> float:
        from math_verify import verify

        raised: Exception | None = None
        for one, other in itertools.product(gold, target):
            try:
                if verify(one, other, strict=self.strict, timeout_seconds=None, raise_on_error=True):
                    return 1.0
            except Exception as error:  # another pair may still be equal; if none is, it counts
                raised = error
        if raised is not None:
            raise raised
        return 0.0


def _parse_alone(text: str) -> list[Any]:
    """Parse a text that is nothing but an answer: [expression, its text], or fewer.

    A box reads commas, sets and units best, dollar signs read percentages, so both are tried.
    """
    text = _PERCENT.sub("%", text.strip().strip("$").strip()).rstrip(".")
    if not text:
        return []
    found: list[Any] = []
    for wrapped in (rf"\boxed{{{text}}}", f"${text}$"):
        found = _parse(wrapped)
        if any(not isinstance(item, str) for item in found):
            break
    return found


@functools.lru_cache(maxsize=8)  # score and answer of a sample need the same parse
def _parse(text: str) -> list[Any]:
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse

    # It warns once a process that its time limits are off, which they are on purpose.
    logging.getLogger("math_verify").setLevel(logging.ERROR)
    configs = [LatexExtractionConfig(boxed_match_priority=0), ExprExtractionConfig()]
    return parse(text, configs, parsing_timeout=None, raise_on_error=True)  # type: ignore[no-any-return]
