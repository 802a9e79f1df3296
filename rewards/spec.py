"""From a specification to a set of named, weighted rewards, and from their parts to one score.

A reward is a callable `reward(sample) -> float | None`: a function, or an object built from settings. Members that it
may have are listed in docs/rewards.md, "Write your own".
"""

import functools
import importlib
import inspect
import json
import math
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rewards.base import RewardError, Sample, Unscorable, nearest

Function = Callable[[Sample], float | None]
_MAX_TEXT_CHARS = 10_000
_LARGEST = sys.float_info.max  # no part is beyond it, and JSON carries no infinity


@dataclass(frozen=True, slots=True)
class Weight:
    """How the part of one named reward counts: its factor in the total, and the bounds it must keep."""

    name: str
    value: float
    bounds: tuple[float, float] = (-_LARGEST, _LARGEST)
    answers: bool = False  # whether the reward extracts answers to vote on


@dataclass(slots=True)
class Measurement:
    """What the rewards said of one sample, before it is added up."""

    parts: dict[str, float | None]
    reasons: dict[str, str]
    answer: str | None


@dataclass(frozen=True, slots=True)
class RewardSet:
    """The rewards of one specification, aligned with their weights."""

    weights: tuple[Weight, ...]
    functions: tuple[Function, ...]

    def measure(self, sample: Sample) -> Measurement:
        """Call every reward. Never raises: what goes wrong is that reward's reason."""
        found = Measurement({}, {}, None)
        for weight, function in zip(self.weights, self.functions, strict=True):
            try:
                part, reason = _checked(function(sample), weight)
                if weight.answers and found.answer is None and (answer := function.answer(sample)) is not None:  # type: ignore[attr-defined]
                    found.answer = _plain(str(answer))
            except Unscorable as error:
                part, reason = None, f"{error} (reward {weight.name!r})"
            except BaseException as error:  # model text that is evaluated can raise SystemExit
                part, reason = None, f"reward {weight.name!r} raised {_describe(error)}"
            found.parts[weight.name] = part
            if reason is not None:
                found.reasons[weight.name] = _plain(reason)
        return found


def total(weights: Sequence[Weight], measured: Measurement) -> tuple[float | None, dict[str, float | None], str | None]:
    """(score = sum of weight * part, parts, reason), each part checked again: it may come from a child.

    The score is None if a part with weight other than 0 is None, or the sum is not finite.
    """
    parts: dict[str, float | None] = {}
    reasons: list[str] = []
    score: float | None = 0.0
    for weight in weights:
        part, reason = _checked(measured.parts.get(weight.name), weight)
        parts[weight.name] = part
        if part is None:
            reasons.append(measured.reasons.get(weight.name) or reason or "not scored")
            score = None if weight.value else score
        elif score is not None:
            score += weight.value * part
    if score is not None and not math.isfinite(score):
        reasons.append(f"the weighted sum of the parts is {score}")
        score = None
    return score, parts, "; ".join(reasons) or None


def _checked(value: Any, weight: Weight) -> tuple[float | None, str | None]:
    """(the part, None), or (None, why it is none)."""
    if value is None:
        return None, f"reward {weight.name!r} returned None"
    try:
        number = float(value if not isinstance(value, str | bytes) else "text")
    except (TypeError, ValueError):
        return None, f"reward {weight.name!r} returned {type(value).__name__}, expected a number or None"
    if not math.isfinite(number):
        return None, f"{'NaN' if math.isnan(number) else number} from reward {weight.name!r}"
    if not weight.bounds[0] <= number <= weight.bounds[1]:
        return None, f"{number} from reward {weight.name!r} lies outside its bounds {weight.bounds}"
    return number, None


def _plain(text: str) -> str:
    """Of a sane length, and without lone surrogates, which JSON cannot carry."""
    return text[:_MAX_TEXT_CHARS].encode("utf-8", "replace").decode("utf-8")


def _describe(error: BaseException) -> str:
    # Of a message that cannot be rendered it says so.
    return traceback.format_exception_only(error)[-1].strip()[:500]


def check_spec(spec: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Check the shape of a specification without importing a target; return it as plain dicts.

    A specification maps names to `{"_target_": "module.Class", "weight": 1.0, **settings}`. Raises RewardError.
    """
    if not isinstance(spec, Mapping) or not spec:
        raise RewardError(f"reward specification {spec!r} is empty or none; expected a mapping of names to rewards")
    for name, entry in spec.items():
        if not isinstance(name, str) or not name or not isinstance(entry, Mapping):
            raise RewardError(f"reward {name!r} is {entry!r}, expected a name and a mapping with _target_")
        target, weight = entry.get("_target_"), entry.get("weight", 1.0)
        if not isinstance(target, str) or "." not in target:
            expected = "an import path, e.g. rewards.math_verify.MathVerify"
            raise RewardError(f"reward {name!r} with the keys {list(entry)}: _target_={target!r} must be {expected}")
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not math.isfinite(weight):
            raise RewardError(f"reward {name!r}: weight={weight!r} must be a finite number")
        try:  # settings travel to the verifier process as JSON, in which NaN would become null
            json.dumps(dict(entry), allow_nan=False)
        except (TypeError, ValueError) as error:
            raise RewardError(f"reward {name!r}: {dict(entry)!r} must hold JSON values only: {error}") from error
    return {name: {str(key): value for key, value in entry.items()} for name, entry in spec.items()}


def build(spec: Mapping[str, Any]) -> RewardSet:
    """Import and construct the rewards of a specification. Raises RewardError."""
    weights, functions = [], []
    for name, entry in check_spec(spec).items():
        target, weight = entry.pop("_target_"), float(entry.pop("weight", 1.0))
        try:
            function = _construct(target, entry)
        except RewardError as error:
            raise RewardError(f"reward {name!r}: {target}: {error}") from error
        low, high = getattr(function, "bounds", None) or (-_LARGEST, _LARGEST)
        bounds = max(float(low), -_LARGEST), min(float(high), _LARGEST)
        weights.append(Weight(name, weight, bounds, callable(getattr(function, "answer", None))))
        functions.append(function)
    return RewardSet(tuple(weights), tuple(functions))


def import_target(path: Any) -> Callable[..., Any]:
    """The class or function at an import path. Raises RewardError."""
    if not isinstance(path, str) or "." not in path:
        raise RewardError(f"{path!r} is not an import path such as package.module.Name")
    module, _, name = path.rpartition(".")
    try:
        place = importlib.import_module(module)
    except (Exception, SystemExit) as error:  # importing runs other people's code
        fix = "install it, or run where its file lies (the working directory is searched)"
        raise RewardError(f"importing {module} raised {_describe(error)}; {fix}") from error
    if not hasattr(place, name):
        raise RewardError(f"{module} has no {name!r}; {nearest(name, (x for x in vars(place) if x[0] != '_'))}")
    found = getattr(place, name)
    try:
        inspect.signature(found)
    except (TypeError, ValueError) as error:  # not callable; a builtin that does not tell its settings
        raise RewardError(f"{path} is a {type(found).__name__}, not a class or function with named settings") from error
    return found  # type: ignore[no-any-return]


def _construct(target: str, settings: dict[str, Any]) -> Function:
    """Other people's code raises what it likes, or would end the run silently: all becomes a RewardError."""
    factory = import_target(target)
    plain = inspect.isfunction(factory)  # a function takes the sample first and its settings by keyword
    try:
        inspect.signature(factory).bind(*[None] * plain, **settings)
    except TypeError as error:
        known = list(inspect.signature(factory).parameters)[plain:]
        wrong = next((f"; {key!r} is not one, {nearest(key, known)}" for key in settings if key not in known), "")
        raise RewardError(f"{error}; its settings are {', '.join(known) or 'none'}{wrong}") from error
    if plain:
        return functools.partial(factory, **settings)
    try:
        reward = factory(**settings)
    except RewardError:
        raise
    except (Exception, SystemExit) as error:
        raise RewardError(f"building it with {settings} raised {_describe(error)}") from error
    if not callable(reward):
        raise RewardError(f"it builds a {type(reward).__name__}, not callable; give it __call__(self, sample)")
    return reward  # type: ignore[no-any-return]
