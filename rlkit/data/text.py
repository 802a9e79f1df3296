"""Text from a row's fields, `{question}` or `{metadata[expression]:nospace}`, and its token ids without loss."""

from __future__ import annotations

import math
import string
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rlkit.errors import DataError, nearest
from rlkit.settings import Checked

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def render(template: str, row: Mapping[str, Any], number: int, key: str) -> str | None:
    """Fill a template from the fields of row `number`; None when a field it uses is null, or all are blank.

    The grammar is that of `str.format` with named fields and indexing, and `:nospace`, which removes all white space.
    `DataError` names `key` (the setting the template comes from), the row, what is missing and what exists.
    """
    formatter = _Formatter()
    try:
        text, filled = formatter.vformat(template, (), row), formatter.filled
        return None if None in filled or (filled and not any(map(str.strip, filter(None, filled)))) else text
    except (LookupError, AttributeError, TypeError, ValueError, MemoryError) as error:
        nested = [f"{name}[{inner}]" for name, value in row.items() if isinstance(value, Mapping) for inner in value]
        fields = [*map(str, row), *nested]
        problem = f"not a valid template (row {number}): {error}"
        if isinstance(error, KeyError):
            name = str(error.args[0])
            problem = f"row {number} has no field {name!r}.{nearest(name, fields)}"
        expected = f"fields of this row: {', '.join(fields)}"
        fix = "name an existing field; write literal braces twice: {{ and }}"
        raise DataError(problem, key=key, value=template, expected=expected, fix=fix) from error


class _Formatter(string.Formatter):
    def __init__(self) -> None:
        self.filled: list[str | None] = []  # what stands for each field

    def get_value(self, key: int | str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        if not isinstance(key, str):
            raise ValueError("a field without a name, such as {} or {0}")
        return kwargs[key]

    def format_field(self, value: Any, format_spec: str) -> str:
        if value is None or (isinstance(value, float) and math.isnan(value)):  # pandas writes null as NaN
            self.filled.append(None)
            return ""
        text = "".join(str(value).split()) if format_spec == "nospace" else str(format(value, format_spec))
        self.filled.append(text)
        return text


class Template(Checked, kw_only=True):
    """A teacher for data with solutions: the completion is the row's own fields, e.g. "{solution}\\n#### {answer}".

    As every teacher it is a component called with a row and its number, gives the same text at every call, and leaves
    the end-of-sequence token out. `DataError` names the row where a field is missing or null.
    """

    template: str

    def __call__(self, row: Mapping[str, Any], index: int) -> str:
        text = render(self.template, row, index, "template")
        if text is None:
            problem, fix = f"a field of row {index} is null, or all are empty", "leave such rows out of the file"
            raise DataError(problem, key="template", value=self.template, fix=fix)
        return text


def encode(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, ids: Sequence[str], key: str) -> list[list[int]]:
    """Token ids of every text, no special token added. `DataError` names characters the tokenizer maps to <unk>."""
    encoded: list[list[int]] = tokenizer(list(texts), add_special_tokens=False).input_ids
    unknown = tokenizer.unk_token_id
    for row_id, text, tokens in zip(ids, texts, encoded, strict=True):
        if unknown is not None and unknown in tokens:
            bad = [x for x in sorted(set(text)) if unknown in tokenizer(x, add_special_tokens=False).input_ids]
            shown = ", ".join(map(repr, bad)) or "a sequence of characters"
            problem = f"{key}: row {row_id!r} has text the tokenizer does not know: {shown} in {text[:200]!r}"
            raise DataError(problem, fix="add them to model.alphabet, change the template, or leave the row out")
    return encoded
