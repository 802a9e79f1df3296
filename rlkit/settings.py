"""Limits of settings, beside their fields: of the schema, and of any component that derives from `Checked`."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, dataclass_transform

from rlkit.errors import ConfigError, nearest


def number(default: Any, low: float = -math.inf, high: float = math.inf) -> Any:
    """A finite number from `low` to `high`, or the default."""
    return field(default=default, metadata={"low": low, "high": high, "limits": f"{low:g} to {high:g}"})


def choice(default: str, *others: str) -> Any:
    """One of a few words; the first is the default."""
    return field(default=default, metadata={"choices": (default, *others), "limits": ", ".join((default, *others))})


def fault(key: str, value: Any, limits: Mapping[str, Any], doc: str = "") -> ConfigError | None:
    """What is wrong with a value by its field's metadata; None for a sound value, for null and without limits."""
    if value is None or not limits:
        return None
    if choices := limits.get("choices"):
        good, near = value in choices, nearest(value, choices)
    else:
        good, near = limits["low"] <= value <= limits["high"] and math.isfinite(value), ""
    return None if good else ConfigError(f"not allowed.{near}", key=key, value=value, expected=limits["limits"] + doc)


@dataclass_transform(frozen_default=True, field_specifiers=(field,))
class Checked:
    """Makes a subclass a frozen dataclass (no decorator beside it): what has a type is a setting, checked when made.

    ConfigError for a value outside its field's `number` or `choice`.
    """

    def __init_subclass__(cls, **options: bool) -> None:
        dataclass(frozen=True, **options)(cls)

    def __post_init__(self) -> None:
        for item in fields(self):  # type: ignore[arg-type]
            if wrong := fault(item.name, getattr(self, item.name), item.metadata):
                raise wrong
