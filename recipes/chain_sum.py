"""The teacher of the quickstart's warm start: sums worked out step by step, with errors at a known rate."""

import random
import re
from collections.abc import Mapping
from typing import Any

from rlkit.data.text import render
from rlkit.errors import DataError
from rlkit.settings import Checked, number

_STEP = re.compile(r"\s*([+-])\s*(-?\d+)")


class ChainSumTeacher(Checked, kw_only=True):
    """A chain of thought for a sum, worked from left to right, with errors at a known rate.

    For "4 - 1 + 7" it writes `4-1=3;3+7=10#10`. Each step errs independently with probability `error_rate`:
    it is off by 1..max_error, and the rest is worked from there. A model that imitates it is right with about
    (1 - error_rate) ** steps: RL has something to improve. Sums of `hard_terms` terms or more, if that is not 0, have
    `hard_error_rate`. Errors are fixed by (seed, index). `expression` is the sum's template. `ConfigError`: settings
    out of range; `DataError`: a row has no such expression.
    """

    error_rate: float = number(0.3, 0, 0.99)
    hard_terms: int = number(0, 0)
    hard_error_rate: float = number(0.3, 0, 0.99)
    seed: int = 0
    max_error: int = number(3, 1)
    expression: str = "{metadata[expression]}"

    def __call__(self, row: Mapping[str, Any], index: int) -> str:
        draw = random.Random(f"{self.seed}/{index}")  # seeded by its SHA-512: stable anywhere
        text = f"+{render(self.expression, row, index, 'expression')}"
        if not re.fullmatch(rf"({_STEP.pattern})+\s*", text):
            problem, expected = f"row {index} holds {text[1:]!r}", 'a sum of integers such as "4 - 1 + 7"'
            raise DataError(problem, key="expression", value=self.expression, expected=expected)
        (_, first), *rest = _STEP.findall(text)
        total, steps = int(first), []
        rate = self.hard_error_rate if 0 < self.hard_terms <= len(rest) + 1 else self.error_rate
        for operator, term in rest:
            result = total + int(term) if operator == "+" else total - int(term)
            if draw.random() < rate:
                result += draw.choice((-1, 1)) * draw.randint(1, self.max_error)
            steps.append(f"{total}{operator}{int(term)}={result}")
            total = result
        return f"{';'.join(steps)}#{total}"
