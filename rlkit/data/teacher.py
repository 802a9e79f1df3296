"""Components that write a row's target completion, for supervised warm starts.

`teacher(row, index) -> str` gives that of row number `index`, without end-of-sequence token, the same at every call.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rlkit.data.text import render
from rlkit.errors import DataError


@dataclass(frozen=True, slots=True, kw_only=True)
class Template:
    """A completion out of the row's own fields, e.g. "{solution}\\n#### {answer}": fine-tuning on data with solutions.

    `DataError` names the row where a field is missing or null.
    """

    template: str

    def __call__(self, row: Mapping[str, Any], index: int) -> str:
        text = render(self.template, row, index, "template")
        if text is None:
            problem, fix = f"a field of row {index} is null, or all are empty", "leave such rows out of the file"
            raise DataError(problem, key="template", value=self.template, fix=fix)
        return text
