"""Components: mappings `{_target_: package.module.Name, field: value, ...}`, checked against their target's own fields.

A target is a dataclass or any callable with named parameters; nothing has to be registered anywhere.
"""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import msgspec

import rewards
from rlkit.config.keys import describe
from rlkit.errors import ConfigError, nearest

TARGET = "_target_"
EXAMPLE = "_target_: package.module.Name"


def build(component: Mapping[str, Any], *, key: str) -> Any:
    """Import a component's target and call it with its fields; `key` is its place in the configuration.

    Raises ConfigError as `validate`, and for whatever the target's constructor refuses.
    """
    settings = validate(component, key)
    try:
        return import_target(component[TARGET], key)(**settings)
    # Plug-ins raise what they like (rewards have their own error class); the cause is kept.
    except (Exception, SystemExit) as error:
        problem = f"{component[TARGET]} refuses its settings ({type(error).__name__}: {error})"
        raise ConfigError(problem, key=key, value=settings) from error


def validate(component: Any, key: str) -> dict[str, Any]:
    """Check a component without calling its target; return its settings, lists as tuples if asked.

    Raises ConfigError: not a mapping with `_target_`, target not to be had, setting unknown (with the nearest), missing
    or of another type; the same for components among the settings.
    """
    if not isinstance(component, Mapping) or TARGET not in component:
        raise ConfigError("not a component", key=key, value=component, expected=f"a mapping with {EXAMPLE}")
    path = component[TARGET]
    target = import_target(path, key)
    try:
        signature = inspect.signature(target, eval_str=True)
    except (NameError, TypeError, AttributeError):
        signature = inspect.signature(target)  # an annotation under `if TYPE_CHECKING`: values go unchecked
    parameters = signature.parameters.values()
    known = {p.name: p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    settings = {str(name): value for name, value in component.items() if name != TARGET}
    for name, value in settings.items():
        place = f"{key}.{name}"
        if name in known:
            settings[name] = converted(value, known[name].annotation, place, path)
        elif not any(p.kind is p.VAR_KEYWORD for p in parameters):
            expected = f"one of {', '.join(known)}" if known else "no settings at all"
            fix = f"to replace the whole component choose an option of its group or give '{key}={{_target_: ..., ...}}'"
            problem = f"{path} has no setting {name!r}.{nearest(name, known)}"
            raise ConfigError(problem, key=place, value=value, expected=expected, fix=fix)
        for inner in value if isinstance(value, list) else [value]:
            if isinstance(inner, Mapping) and TARGET in inner:
                validate(inner, place)
    if lacking := [p.name for p in known.values() if p.default is p.empty and p.name not in settings]:
        problem = f"{path} needs the setting{'s' * (len(lacking) > 1)} {', '.join(lacking)}"
        raise ConfigError(problem, key=key, value=dict(component), fix=f"set {key}.{lacking[0]}=...")
    return settings


def import_target(path: Any, key: str) -> Callable[..., Any]:
    """The class or function at an import path. Raises ConfigError."""
    try:
        return rewards.import_target(path)
    except rewards.RewardError as error:
        raise ConfigError(str(error), key=f"{key}.{TARGET}", value=path, expected=EXAMPLE) from error


def converted(value: Any, annotation: Any, key: str, path: str) -> Any:
    """A plain (YAML) value as the annotation asks; as it is where the annotation is more than plain types."""

    def unknown(kind: type, given: Any) -> Any:
        raise LookupError(kind)

    try:
        return msgspec.convert(value, annotation, dec_hook=unknown)
    except msgspec.ValidationError as error:
        raise ConfigError(f"wrong type for {path}", key=key, value=value, expected=describe(annotation)) from error
    except (LookupError, TypeError):  # TypeError: a union msgspec cannot tell apart, too
        return value
