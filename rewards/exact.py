"""Exact match of the extracted answer with the reference, as text or as numbers."""

import re
from dataclasses import dataclass
from fractions import Fraction

from rewards.base import Sample, Unscorable
from rewards.extraction import check_extraction, extract

# No exponents: Fraction("1e999999999") would build the number.
_NUMERIC = re.compile(r"[-+]?(?:\d+(?:\.\d*)?|\.\d+)(?:/\d+)?")


@dataclass(frozen=True, slots=True)
class ExactMatch:
    """1.0 if the extracted answer equals the reference, else 0.0; no answer found is 0.0.

    extract, marker: where the answer stands (docs/rewards.md); ignore_case: for text; numeric: compare as numbers
    ("$1,234.50" equals "1234.5"): a reference that is no number is unscorable, an answer that is none is 0.0.
    """

    bounds = (0.0, 1.0)
    binary = True
    extract: str = "delimiter"
    marker: str = ""
    numeric: bool = False
    ignore_case: bool = False

    def __post_init__(self) -> None:
        check_extraction(self.extract, self.marker)

    def __call__(self, sample: Sample) -> float:
        if sample.reference is None:
            raise Unscorable("no reference")
        found = extract(sample.completion, self.extract, self.marker)
        if self.numeric:
            gold = to_fraction(sample.reference)
            if gold is None:
                raise Unscorable(f"reference {sample.reference!r} is not a number")
            return float(to_fraction(found or "") == gold)
        return float(found is not None and self._text(found) == self._text(sample.reference))

    def answer(self, sample: Sample) -> str | None:
        """The extracted answer; a number in lowest terms when `numeric`."""
        found = extract(sample.completion, self.extract, self.marker)
        value = to_fraction(found or "") if self.numeric else None
        if value is not None:
            return str(value)
        return None if found is None else self._text(found)

    def _text(self, text: str) -> str:
        text = " ".join(text.split())
        return text.casefold() if self.ignore_case else text


def to_fraction(text: str) -> Fraction | None:
    """The number a text writes ("$1,234.50", "3/4", "12%" as 12), or None if it writes none."""
    bare = text.strip().strip("$").replace(",", "").replace(" ", "").removesuffix("%").rstrip(".")
    if not _NUMERIC.fullmatch(bare):
        return None
    top, _, bottom = bare.partition("/")
    divisor = Fraction(bottom or 1)
    return None if divisor == 0 else Fraction(top) / divisor
