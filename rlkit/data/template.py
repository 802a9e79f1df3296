"""Text from a row's fields: `{question}`, `{metadata[expression]}`, `{expression:nospace}`."""

from __future__ import annotations

import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rlkit.errors import DataError, nearest


@dataclass(frozen=True, slots=True)
class RowTemplate:
    """A format string over a row's fields.

    The grammar is that of `str.format` with named fields and indexing; a literal brace is doubled
    (`\\boxed{{{answer}}}`). One format is added: `:nospace` removes all white space of the value.

    Example:
        >>> RowTemplate("{metadata[expression]:nospace}=", "data.train.prompt")(
        ...     {"metadata": {"expression": "4 - 1 + 7"}}, number=0)
        '4-1+7='

    Attributes:
        text: the format string. key: the setting it comes from, for messages.
    """

    text: str
    key: str

    def __call__(self, row: Mapping[str, Any], number: int) -> str | None:
        """Render row `number`; None when a field it uses is null.

        Raises `DataError` naming the missing field, the row and the fields that exist.
        """
        try:
            return _FORMATTER.vformat(self.text, (), row)
        except _NullField:
            return None
        except _NotNamed as error:
            raise self._error(str(error), fix="write literal braces twice: {{ and }}") from error
        except (KeyError, AttributeError, IndexError, TypeError) as error:
            fields = field_names(row)
            field = error.args[0] if isinstance(error, KeyError) else self.text
            what = (
                f"row {number} has no field {field!r}.{nearest(str(field), fields)}"
                if isinstance(error, KeyError)
                else f"row {number}: {error}"
            )
            raise self._error(
                what,
                expected=f"fields of this row: {', '.join(fields)}",
                fix="name an existing field; write literal braces twice: {{ and }}",
            ) from error
        except ValueError as error:
            raise self._error(
                f"not a valid template (row {number}): {error}", fix="write literal braces twice: {{ and }}"
            ) from error

    def _error(self, problem: str, expected: str | None = None, fix: str | None = None) -> DataError:
        return DataError(problem, key=self.key, value=self.text, expected=expected, fix=fix)


def field_names(row: Mapping[str, Any]) -> list[str]:
    """Names a template can use: `question`, and `metadata[expression]` for nested mappings."""
    names: list[str] = []
    for name, value in row.items():
        names.append(str(name))
        if isinstance(value, Mapping):
            names += [f"{name}[{inner}]" for inner in value]
    return names


class _NullField(Exception):
    pass


class _NotNamed(Exception):
    pass


class _Formatter(string.Formatter):
    def get_value(self, key: int | str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        if not isinstance(key, str):
            raise _NotNamed("a field without a name, such as {} or {0}")
        return kwargs[key]

    def format_field(self, value: Any, format_spec: str) -> str:
        if value is None:
            raise _NullField
        if format_spec == "nospace":
            return "".join(str(value).split())
        return str(super().format_field(value, format_spec))


_FORMATTER = _Formatter()
