"""Components: plug-ins addressed by import path, checked against their own fields.

A component is a mapping `{_target_: package.module.Name, field: value, ...}`. The target is a
dataclass or any callable with named parameters; nothing has to be registered anywhere.
"""

from __future__ import annotations

import importlib
import inspect
import types
import typing
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

from rlkit.config.keys import describe
from rlkit.errors import ConfigError, RlkitError, nearest

TARGET = "_target_"


@dataclass(frozen=True, slots=True)
class Parameter:
    """One setting a target takes."""

    name: str
    annotation: Any  # Any where it has none, or none that can be resolved
    required: bool


def build(component: Mapping[str, Any], *, key: str, **extra: Any) -> Any:
    """Import a component's target and call it with its fields and `extra`.

    `key` is where the component stands in the configuration ("algorithm.loss"), for messages.

    Raises:
        ConfigError: as `validate`, and for whatever the target's constructor refuses.
    """
    settings = validate(component, key, supplied=extra)
    target = import_target(component[TARGET], key)
    try:
        return target(**settings, **extra)
    except RlkitError as error:
        raise ConfigError(f"in {key} ({component[TARGET]}): {error}") from error
    # Plug-ins raise what they like (rewards have their own error class); the cause is kept.
    except Exception as error:
        raise ConfigError(
            f"{component[TARGET]} refuses its settings ({type(error).__name__}: {error})", key=key, value=settings
        ) from error


def validate(
    component: Any, key: str, *, supplied: Collection[str] = (), ignored: Collection[str] = ()
) -> dict[str, Any]:
    """Check a component without calling its target; return its settings, lists as tuples if asked.

    Components inside its settings are checked too. `supplied` are parameters the caller will give,
    `ignored` keys that are not the target's (a reward's weight).

    Raises:
        ConfigError: not a mapping with `_target_`, target that cannot be imported, unknown setting
            (with the nearest), missing setting, value of another type than the annotation says.
    """
    if not isinstance(component, Mapping) or TARGET not in component:
        near = nearest(TARGET, map(str, component)) if isinstance(component, Mapping) else ""
        raise ConfigError(
            f"not a component.{near}", key=key, value=component, expected="a mapping with _target_: package.module.Name"
        )
    path = component[TARGET]
    known = {p.name: p for p in parameters(import_target(path, key)) if p.name not in supplied}
    open_ended = "**" in known
    settings: dict[str, Any] = {}
    for name, value in component.items():
        if name == TARGET or name in ignored:
            continue
        if name not in known and not open_ended:
            names = [n for n in known if n != "**"]
            raise ConfigError(
                f"{path} has no setting {name!r}.{nearest(str(name), names)}",
                key=f"{key}.{name}",
                value=value,
                expected=f"one of {', '.join(names)}" if names else "no settings at all",
                fix=f"if it was meant for another component, replace the whole of {key}: "
                f"choose an option of its group or give '{key}={{_target_: ..., ...}}'",
            )
        annotation = known[name].annotation if name in known else Any
        if not fits(value, annotation):
            raise ConfigError(f"wrong type for {path}", key=f"{key}.{name}", value=value, expected=describe(annotation))
        _validate_nested(value, f"{key}.{name}")
        settings[str(name)] = _as_tuple(value, annotation)
    lacking = [p.name for p in known.values() if p.required and p.name not in settings]
    if lacking:
        raise ConfigError(
            f"{path} needs the setting{'s' if len(lacking) > 1 else ''} {', '.join(lacking)}",
            key=key,
            value=dict(component),
            fix=f"set {key}.{lacking[0]}=...",
        )
    return settings


def _validate_nested(value: Any, key: str) -> None:
    if isinstance(value, Mapping):
        if TARGET in value:
            validate(value, key)
        else:
            for name, inner in value.items():
                _validate_nested(inner, f"{key}.{name}")
    elif isinstance(value, list | tuple):
        for index, inner in enumerate(value):
            _validate_nested(inner, f"{key}[{index}]")


def import_target(path: Any, key: str) -> Callable[..., Any]:
    """The class or function at an import path, also one nested in a class. Raises ConfigError."""
    if not isinstance(path, str) or "." not in path:
        raise ConfigError(
            "not an import path",
            key=f"{key}.{TARGET}",
            value=path,
            expected="package.module.Name (your own code is found from the working directory)",
        )
    *parents, _ = names = path.split(".")
    for cut in range(len(parents), 0, -1):
        module_name = ".".join(names[:cut])
        try:
            found: Any = importlib.import_module(module_name)
        except ModuleNotFoundError as error:
            if error.name is not None and f"{module_name}.".startswith(f"{error.name}."):
                continue  # this part of the path is no module; perhaps it is a class
            raise _not_importable(path, key, module_name, error) from error
        # Importing runs other people's code, which may raise anything.
        except Exception as error:
            raise _not_importable(path, key, module_name, error) from error
        for position, name in enumerate(names[cut:], start=cut):
            if not hasattr(found, name):
                here = ".".join(names[:position])
                members = [n for n in vars(found) if not n.startswith("_")]
                raise ConfigError(f"{here} has no {name!r}.{nearest(name, members)}", key=f"{key}.{TARGET}", value=path)
            found = getattr(found, name)
        if not callable(found):
            raise ConfigError(
                f"this is a {type(found).__name__}, not a class or function", key=f"{key}.{TARGET}", value=path
            )
        return found  # type: ignore[no-any-return]
    raise ConfigError(
        f"cannot be imported: no module named {names[0]!r}",
        key=f"{key}.{TARGET}",
        value=path,
        fix="install it, or run where its file lies (the working directory is searched)",
    )


def _not_importable(path: str, key: str, module: str, error: Exception) -> ConfigError:
    return ConfigError(
        f"cannot be imported: importing {module} raised {type(error).__name__}: {error}",
        key=f"{key}.{TARGET}",
        value=path,
    )


def parameters(target: Callable[..., Any]) -> list[Parameter]:
    """Named parameters of a dataclass or callable; one called `**` if it takes any."""
    annotated = target.__init__ if inspect.isclass(target) else target  # type: ignore[misc]
    try:
        hints = typing.get_type_hints(annotated)
    except (NameError, TypeError, AttributeError):
        hints = {}  # an annotation under `if TYPE_CHECKING`: its values go unchecked
    out = []
    for parameter in inspect.signature(target).parameters.values():
        if parameter.kind is parameter.VAR_KEYWORD:
            out.append(Parameter("**", Any, False))
        elif parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
            required = parameter.default is parameter.empty
            out.append(Parameter(parameter.name, hints.get(parameter.name, Any), required))
    return out


def fits(value: Any, annotation: Any) -> bool:
    """Whether a plain (YAML) value suits an annotation; True for annotations not understood."""
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (typing.Union, types.UnionType):
        return any(fits(value, arg) for arg in args)
    if origin is typing.Annotated:
        return fits(value, args[0])
    if origin is typing.Literal:
        return any(type(value) is type(arg) and value == arg for arg in args)
    if annotation is type(None) or annotation is None:
        return value is None
    if annotation is bool:
        return isinstance(value, bool)
    if annotation is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if annotation is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if annotation is str:
        return isinstance(value, str)
    container = origin if origin is not None else annotation
    if not isinstance(container, type):
        return True
    if container is not object and issubclass(container, Mapping):
        if not isinstance(value, Mapping):
            return False
        return len(args) != 2 or all(fits(v, args[1]) for v in value.values())
    if container in (list, tuple, set, frozenset) or (
        container.__module__ == "collections.abc" and container.__name__ in _SEQUENCES
    ):
        if not isinstance(value, list | tuple):
            return False
        if container is tuple and args and args[-1] is not Ellipsis:
            return len(value) == len(args) and all(map(fits, value, args))
        return not args or all(fits(item, args[0]) for item in value)
    return True


_SEQUENCES = ("Sequence", "Collection", "Iterable")


def _as_tuple(value: Any, annotation: Any) -> Any:
    """A list as a tuple where the annotation asks for one (frozen dataclasses are hashable then)."""
    options = [annotation, *typing.get_args(annotation)]
    wants = any(option is tuple or typing.get_origin(option) is tuple for option in options)
    return tuple(value) if wants and isinstance(value, list) else value
