"""The keys a recipe may have, read off the schema: walking them, naming types, near misses."""

import dataclasses
import inspect
import re
from collections.abc import Iterator, Mapping
from functools import cache
from types import NoneType, UnionType
from typing import Any, Literal, TypeGuard, Union, get_args, get_origin

from rlkit.config.schema import Component, Config, DatasetConfig
from rlkit.errors import ConfigError, nearest

WORDS = {int: "integer", float: "number", str: "text", bool: "true or false", NoneType: "null", Any: "anything"}
WORDS |= {Component: "component (a mapping with _target_)"}


def unwrap(annotation: Any) -> Any:
    """`X` of `X | None`; anything else as it is."""
    inner = [arg for arg in get_args(annotation) if arg is not NoneType]
    return inner[0] if len(inner) == 1 and NoneType in get_args(annotation) else annotation


def is_section(annotation: Any) -> TypeGuard[type]:
    """Whether this is a dataclass of the schema."""
    return isinstance(annotation, type) and dataclasses.is_dataclass(annotation)


def describe(annotation: Any) -> str:
    """The type in words a recipe's author uses: "integer or null", "list of number", ..."""
    if annotation in WORDS:
        return WORDS[annotation]
    origin, args = get_origin(annotation), get_args(annotation)
    if origin in (Union, UnionType):
        return " or ".join(map(describe, args))
    if origin is Literal:
        return " or ".join(map(repr, args))
    if origin in (list, tuple):
        return f"list of {describe(args[0])}"
    if origin is dict:
        return f"mapping of names to {describe(args[1])}"
    return "section" if is_section(annotation) else str(getattr(annotation, "__name__", annotation))


@cache
def comments(section: type) -> dict[str, str]:
    """Documentation of a section's keys by name: the comment beside the field."""
    lines = (line for kind in reversed(section.__mro__[:-1]) for line in inspect.getsource(kind).split("\n"))
    return {found[1]: found[2] for line in lines if (found := re.match(r"    (\w+): .*  # (.*)", line))}


def walk(section: type = Config, prefix: str = "") -> Iterator[tuple[str, dataclasses.Field[Any]]]:
    """Every key of the schema by its dotted path, depth first; `*` stands for a name."""
    for field in dataclasses.fields(section):
        yield f"{prefix}{field.name}", field
        inner = unwrap(field.type)
        for kind, dot in [(inner, "."), *((argument, ".*.") for argument in get_args(inner))]:
            if is_section(kind):
                yield from walk(kind, f"{prefix}{field.name}{dot}")


def sections(section: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Every section of a configuration with its dotted key ("" for the whole)."""
    yield path, section
    for name, value in vars(section).items():
        named = value.items() if isinstance(value, dict) else [("", value)]
        for key, inner in named:
            if dataclasses.is_dataclass(inner):
                yield from sections(inner, ".".join(filter(None, (path, name, key))))


def datasets(config: Config) -> dict[str, DatasetConfig]:
    """Every data set of a configuration by its key."""
    return {path: section for path, section in sections(config) if isinstance(section, DatasetConfig)}


def locate(path: str, *, value: object = None, where: str = "") -> Any:
    """Annotation of the key at a dotted path, `Any` inside a component; ConfigError, `where` in it, for no such key."""
    annotation: Any = Config
    parent = ""
    for part in path.partition("[")[0].split("."):
        inner = unwrap(annotation)
        if inner in (Component, Any):
            return Any
        if is_section(inner):
            known = {field.name: field.type for field in dataclasses.fields(inner)}
            if part not in known:
                raise _unknown(path, parent, list(known), value, where)
            annotation = known[part]
        elif get_origin(inner) is dict:
            annotation = get_args(inner)[1]
        else:
            problem = f"no such key{where}: {parent} is {describe(annotation)}, not a section"
            raise ConfigError(problem, key=path, value=value, fix=f"set {parent} itself")
        parent = f"{parent}.{part}".lstrip(".")
    return annotation


def _unknown(path: str, parent: str, known: list[str], value: object, where: str) -> ConfigError:
    # The right name in the wrong section comes before a similar name in this one.
    everywhere = [key for key, _ in walk()]
    same = [key for key in everywhere if key.split(".")[-1] == path.split(".")[-1]]
    near = f" Did you mean {' or '.join(map(repr, same[:3]))}?" if same else ""
    near = near or nearest(path, [f"{parent}.{name}".lstrip(".") for name in known]) or nearest(path, everywhere)
    expected = f"one of {', '.join(known)}" + (f" (in {parent})" if parent else "")
    fix = "docs/config.md lists all keys"
    return ConfigError(f"no such key{where}.{near}", key=path, value=value, expected=expected, fix=fix)


def leaves(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Nested mappings -> {"a.b.c": leaf}; an empty mapping is a leaf."""
    if not isinstance(tree, Mapping) or not tree:
        return {prefix: tree}
    return {k: v for key, value in tree.items() for k, v in leaves(value, f"{prefix}.{key}".lstrip(".")).items()}
