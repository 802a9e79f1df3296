"""From a specification to a set of named, weighted rewards, and from their parts to one score."""

from __future__ import annotations

import functools
import importlib
import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from rewards.base import Sample
from rewards.errors import RewardError, Unscorable, nearest

__all__ = ["Measurement", "NamedReward", "RewardSet", "build", "check_spec"]

_RESERVED = ("_target_", "weight")


@dataclass(frozen=True, slots=True)
class NamedReward:
    """A reward, the name its part is logged under, and its weight in the total."""

    name: str
    weight: float
    reward: Callable[[Sample], float | None]


@dataclass(frozen=True, slots=True)
class Measurement:
    """What the rewards said of one sample, before it is added up."""

    parts: dict[str, float | None]
    reasons: dict[str, str]
    answer: str | None


@dataclass(frozen=True, slots=True)
class RewardSet:
    """The rewards of one specification; total = sum of weight * part."""

    rewards: tuple[NamedReward, ...]

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(item.name for item in self.rewards)

    def warm_up(self) -> None:
        """Run each reward's `warm_up`, if it has one."""
        for item in self.rewards:
            hook = getattr(item.reward, "warm_up", None)
            if hook is not None:
                hook()

    def measure(self, sample: Sample) -> Measurement:
        """Call every reward. Never raises: what goes wrong is that reward's reason."""
        parts: dict[str, float | None] = {}
        reasons: dict[str, str] = {}
        answer: str | None = None
        for item in self.rewards:
            try:
                parts[item.name], reason = _checked(item.reward(sample), item)
                if reason is not None:
                    reasons[item.name] = reason
                extract = getattr(item.reward, "answer", None)
                if answer is None and extract is not None:
                    found = extract(sample)
                    answer = None if found is None else str(found)
            except Unscorable as error:
                parts[item.name], reasons[item.name] = None, f"{error} (reward {item.name!r})"
            # BaseException: model text that is evaluated can raise SystemExit.
            except BaseException as error:
                parts[item.name] = None
                reasons[item.name] = f"reward {item.name!r} raised {_describe(error)}"
        return Measurement(parts, reasons, answer)

    def total(self, measured: Measurement) -> tuple[float | None, str | None]:
        """(score, reason) of a measurement, each part checked again (it may come from a child).

        The score is None if a part with weight other than 0 is None, or the sum is not finite.
        """
        total: float | None = 0.0
        reasons: list[str] = []
        for item in self.rewards:
            part, reason = _checked(measured.parts.get(item.name), item)
            measured.parts[item.name] = part
            if part is None:
                reasons.append(measured.reasons.get(item.name) or reason or "not scored")
                if item.weight != 0:
                    total = None
            elif total is not None:
                total += item.weight * part
        if total is not None and not math.isfinite(total):
            reasons.append(f"the weighted sum of the parts is {total}")
            total = None
        return total, "; ".join(reasons) or None


def _checked(value: Any, item: NamedReward) -> tuple[float | None, str | None]:
    if value is None:
        return None, f"reward {item.name!r} returned None"
    try:
        number = float(value)
    except (TypeError, ValueError):
        kind = type(value).__name__
        return None, f"reward {item.name!r} returned {kind}, expected a number or None"
    if math.isnan(number):
        return None, f"NaN from reward {item.name!r}"
    if math.isinf(number):
        return None, f"{number} from reward {item.name!r}"
    bounds = getattr(item.reward, "bounds", None)
    if bounds is not None and not bounds[0] <= number <= bounds[1]:
        return None, f"{number} from reward {item.name!r} lies outside its bounds {tuple(bounds)}"
    return number, None


def _describe(error: BaseException) -> str:
    try:
        text = str(error)
    except Exception as nested:  # a message that cannot be rendered must not cost the verdict
        text = f"(its message raised {type(nested).__name__})"
    return f"{type(error).__name__}: {text}"[:500]


def check_spec(spec: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Check the shape of a specification without importing a target; return it as plain dicts.

    A specification maps names to `{"_target_": "module.Class", "weight": 1.0, **settings}`.
    Raises RewardError.
    """
    if not isinstance(spec, Mapping):
        raise RewardError(f"reward specification is {type(spec).__name__}, expected a mapping of names to rewards")
    if not spec:
        raise RewardError("reward specification is empty; name at least one reward")
    plain: dict[str, dict[str, Any]] = {}
    for name, entry in spec.items():
        if not isinstance(name, str) or not name:
            raise RewardError(f"reward name {name!r} must be a non-empty string")
        if not isinstance(entry, Mapping):
            raise RewardError(f"reward {name!r} is {entry!r}, expected a mapping with _target_")
        target = entry.get("_target_")
        if target is None:
            hint = [key for key in entry if str(key).strip("_") == "target"]
            more = f"; {hint[0]!r} should read '_target_'" if hint else ""
            raise RewardError(
                f"reward {name!r} has no _target_; give the import path of a reward, "
                f"e.g. rewards.math_verify.MathVerify{more}"
            )
        if not isinstance(target, str) or "." not in target:
            raise RewardError(f"reward {name!r}: _target_={target!r} must be an import path 'module.Class'")
        weight = entry.get("weight", 1.0)
        if isinstance(weight, bool) or not isinstance(weight, int | float):
            raise RewardError(f"reward {name!r}: weight={weight!r} must be a number")
        if not math.isfinite(weight):
            raise RewardError(f"reward {name!r}: weight={weight!r} must be finite")
        plain[name] = {str(key): value for key, value in entry.items()}
    if all(entry.get("weight", 1.0) == 0 for entry in plain.values()):
        raise RewardError(
            f"every reward has weight 0 ({', '.join(plain)}): each total would be 0; give at least one a weight"
        )
    return plain


def build(spec: Mapping[str, Any]) -> RewardSet:
    """Import and construct the rewards of a specification. Raises RewardError."""
    items = []
    for name, entry in check_spec(spec).items():
        settings = {key: value for key, value in entry.items() if key not in _RESERVED}
        reward = _construct(name, entry["_target_"], settings)
        items.append(NamedReward(name, float(entry.get("weight", 1.0)), reward))
    return RewardSet(tuple(items))


def _construct(name: str, target: str, settings: dict[str, Any]) -> Callable[[Sample], float | None]:
    factory = _locate(name, target)
    # A plain function takes the sample first and its settings by keyword.
    plain = inspect.isfunction(factory)
    parameters = list(inspect.signature(factory).parameters.values())[1 if plain else 0 :]
    if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        known = [parameter.name for parameter in parameters]
        for key, value in settings.items():
            if key not in known:
                raise RewardError(
                    f"reward {name!r}: {target} has no setting {key!r} (value {value!r}); {nearest(key, known)}"
                )
    for parameter in parameters:
        required = parameter.default is parameter.empty and parameter.kind not in (
            parameter.VAR_POSITIONAL,
            parameter.VAR_KEYWORD,
        )
        if required and parameter.name not in settings:
            raise RewardError(f"reward {name!r}: {target} needs the setting {parameter.name!r}")
    if plain:
        return functools.partial(factory, **settings)
    try:
        reward = factory(**settings)
    except RewardError as error:
        raise RewardError(f"reward {name!r}: {error}") from error
    except Exception as error:
        raise RewardError(f"reward {name!r}: {target}({settings}) raised {_describe(error)}") from error
    if not callable(reward):
        raise RewardError(
            f"reward {name!r}: {target} builds a {type(reward).__name__}, which is not callable; "
            "give it __call__(self, sample)"
        )
    return reward  # type: ignore[no-any-return]


def _locate(name: str, target: str) -> Callable[..., Any]:
    module_name, _, attribute = target.rpartition(".")
    try:
        module = importlib.import_module(module_name)
    except Exception as error:
        raise RewardError(
            f"reward {name!r}: _target_={target!r}: importing {module_name!r} raised "
            f"{_describe(error)}; is it on the Python path?"
        ) from error
    found = getattr(module, attribute, None)
    if found is None:
        members = [key for key, value in vars(module).items() if callable(value)]
        raise RewardError(
            f"reward {name!r}: module {module_name!r} has no {attribute!r}; {nearest(attribute, members)}"
        )
    if not callable(found):
        raise RewardError(f"reward {name!r}: {target} is {found!r}, which cannot be called")
    return found  # type: ignore[no-any-return]
