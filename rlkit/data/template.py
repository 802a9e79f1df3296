"""Text from a row's fields: `{question}`, `{metadata[expression]}`, `{expression:nospace}`."""

from __future__ import annotations

import string
from collections.abc import Mapping, Sequence
from typing import Any

from rlkit.errors import DataError, nearest


def render(template: str, row: Mapping[str, Any], number: int, key: str) -> str | None:
    """Fill a template from the fields of row `number`; None when a field it uses is null.

    The grammar is that of `str.format` with named fields and indexing; a literal brace is doubled
    (`\\boxed{{{answer}}}`). One format is added: `:nospace` removes all white space of the value.

    Example:
        >>> render("{metadata[expression]:nospace}=", {"metadata": {"expression": "4 - 1 + 7"}}, 0, "prompt")
        '4-1+7='

    Raises `DataError` naming `key` (the setting the template comes from), the missing field, the row
    and the fields that exist.
    """
    try:
        return _FORMATTER.vformat(template, (), row)
    except _NullField:
        return None
    except (LookupError, AttributeError, TypeError, ValueError) as error:
        fields = field_names(row)
        problem = f"not a valid template (row {number}): {error}"
        if isinstance(error, KeyError):
            name = str(error.args[0])
            problem = f"row {number} has no field {name!r}.{nearest(name, fields)}"
        expected = f"fields of this row: {', '.join(fields)}"
        fix = "name an existing field; write literal braces twice: {{ and }}"
        raise DataError(problem, key=key, value=template, expected=expected, fix=fix) from error


def field_names(row: Mapping[str, Any]) -> list[str]:
    """Names a template can use: `question`, and `metadata[expression]` for nested mappings."""
    nested = [f"{name}[{inner}]" for name, value in row.items() if isinstance(value, Mapping) for inner in value]
    return [*map(str, row), *nested]


class _NullField(Exception):
    pass


class _Formatter(string.Formatter):
    def get_value(self, key: int | str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        if not isinstance(key, str):
            raise ValueError("a field without a name, such as {} or {0}")
        return kwargs[key]

    def format_field(self, value: Any, format_spec: str) -> str:
        if value is None:
            raise _NullField
        if format_spec == "nospace":
            return "".join(str(value).split())
        return str(super().format_field(value, format_spec))


_FORMATTER = _Formatter()
