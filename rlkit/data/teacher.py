"""Components that write a row's target completion, for supervised warm starts."""

from __future__ import annotations

import random
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from rlkit.data.template import RowTemplate
from rlkit.errors import ConfigError, DataError

_TERM = r"-?\d+"
_EXPRESSION = re.compile(rf"{_TERM}(?:\s*[+-]\s*{_TERM})*")
_STEP = re.compile(rf"\s*([+-])\s*({_TERM})")


class Teacher(Protocol):
    """Writes the completion of a row; the same (row, index) always gives the same text."""

    def __call__(self, row: Mapping[str, Any], index: int) -> str:
        """Completion of row number `index`, without the end-of-sequence token."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Template:
    """A completion out of the row's own fields: ordinary fine-tuning on data with solutions.

    Example:
        Template(template="{solution}\\n#### {answer}")

    Raises `DataError` naming the row where a field is missing or null.
    """

    template: str

    def __call__(self, row: Mapping[str, Any], index: int) -> str:
        text = RowTemplate(self.template, "template")(row, index)
        if text is None:
            raise DataError(
                f"a field of row {index} is null",
                key="template",
                value=self.template,
                fix="leave such rows out of the file",
            )
        return text


@dataclass(frozen=True, slots=True, kw_only=True)
class ChainSumTeacher:
    """A chain of thought for a sum, worked from left to right, with errors at a known rate.

    For "4 - 1 + 7" it writes `4-1=3;3+7=10#10`. Each step errs independently with probability
    `error_rate`: the result is off by 1..max_error, and the rest is worked from the wrong result
    without a further slip. A model that imitates it masters the steps and samples full solutions
    that are right with about (1 - error_rate) ** steps: reinforcement learning has something to
    improve. Errors are fixed by (seed, index).

    Attributes:
        error_rate: probability of a wrong result, a step; in [0, 1).
        seed: of the errors.
        max_error: largest distance of a wrong result from the right one.
        step: text of a step, from {left}, {operator}, {right} and {result}.
        separator: between steps.
        mark: before the final answer.
        expression: where a row holds the expression.

    Raises `ConfigError` on settings out of range, `DataError` where a row has no such expression.
    """

    error_rate: float = 0.3
    seed: int = 0
    max_error: int = 3
    step: str = "{left}{operator}{right}={result}"
    separator: str = ";"
    mark: str = "#"
    expression: str = "{metadata[expression]}"

    def __post_init__(self) -> None:
        if not 0 <= self.error_rate < 1:
            raise ConfigError("not a rate", key="error_rate", value=self.error_rate, expected="0 <= rate < 1")
        if self.max_error < 1:
            raise ConfigError(
                "an error changes the result", key="max_error", value=self.max_error, expected="1 or more"
            )
        try:
            self.step.format(left=1, operator="+", right=1, result=2)
        except (KeyError, IndexError, ValueError) as error:
            raise ConfigError(
                f"not a valid step ({error!r})",
                key="step",
                value=self.step,
                expected="a template of {left}, {operator}, {right}, {result}",
            ) from error

    def __call__(self, row: Mapping[str, Any], index: int) -> str:
        draw = random.Random(f"{self.seed}/{index}")  # seeded by its SHA-512: stable anywhere
        total, steps = self._parse(row, index)
        lines: list[str] = []
        for operator, right in steps:
            result = total + right if operator == "+" else total - right
            if draw.random() < self.error_rate:
                result += draw.choice((-1, 1)) * draw.randint(1, self.max_error)
            lines.append(self.step.format(left=total, operator=operator, right=right, result=result))
            total = result
        return f"{self.separator.join(lines)}{self.mark}{total}"

    def _parse(self, row: Mapping[str, Any], index: int) -> tuple[int, list[tuple[str, int]]]:
        text = RowTemplate(self.expression, "expression")(row, index)
        if text is None or _EXPRESSION.fullmatch(text.strip()) is None:
            raise DataError(
                f"row {index} holds {text!r}",
                key="expression",
                value=self.expression,
                expected='a sum of integers such as "4 - 1 + 7"',
            )
        text = text.strip()
        first = re.match(_TERM, text)
        assert first is not None  # _EXPRESSION begins with a term
        steps = [(op, int(term)) for op, term in _STEP.findall(text, first.end())]
        return int(first[0]), steps
