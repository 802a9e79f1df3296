"""The reference answer of a row."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from rlkit.config.schema import DatasetConfig
from rlkit.data.template import RowTemplate
from rlkit.errors import ConfigError, DataError


class Reference:
    """Callable that gives a row's reference answer: `reference`, then `reference_pattern`.

    Raises `ConfigError` on a pattern that is none; `DataError` naming the row where nothing
    matches it, or where a required answer is null or empty.
    """

    def __init__(self, config: DatasetConfig, key: str) -> None:
        self.key = key
        self.template = None if config.reference is None else RowTemplate(config.reference, f"{key}.reference")
        self.pattern: re.Pattern[str] | None = None
        if config.reference_pattern is not None:
            try:
                self.pattern = re.compile(config.reference_pattern)
            except re.error as error:
                raise ConfigError(
                    f"not a regular expression: {error}", key=f"{key}.reference_pattern", value=config.reference_pattern
                ) from error

    def __call__(self, row: Mapping[str, Any], number: int, row_id: str, required: bool) -> str | None:
        text = None if self.template is None else self.template(row, number)
        if text and self.pattern is not None:
            text = self._final(self.pattern, text, row_id)
        if not text and required:
            raise DataError(
                f"row {row_id!r} has no reference answer (null or empty)",
                key=f"{self.key}.reference",
                value=None if self.template is None else self.template.text,
                expected="an answer in every row: the reward needs it",
                fix="leave the row out of the data",
            )
        return text or None

    def _final(self, pattern: re.Pattern[str], text: str, row_id: str) -> str:
        found = pattern.search(text)
        if found is None:
            raise DataError(
                f"nothing in row {row_id!r} matches: {text[-200:]!r}",
                key=f"{self.key}.reference_pattern",
                value=pattern.pattern,
                expected="a match in every row's reference",
            )
        return ((found[1] if pattern.groups else found[0]) or "").strip()
