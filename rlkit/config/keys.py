"""The keys a recipe may have, read off the schema: walking them, naming types, near misses."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import types
import typing
from collections.abc import Iterator
from functools import cache
from typing import Any

from rlkit.config.schema import Config
from rlkit.errors import ConfigError, nearest


@dataclasses.dataclass(frozen=True, slots=True)
class Key:
    """One key of the schema: `learner.betas`, its annotation, default and documentation."""

    path: str
    annotation: Any
    default: Any  # dataclasses.MISSING where a section stands
    doc: str


def unwrap(annotation: Any) -> Any:
    """`X` of `X | None`; anything else as it is."""
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        inner = [arg for arg in typing.get_args(annotation) if arg is not type(None)]
        if len(inner) == 1:
            return inner[0]
    return annotation


def describe(annotation: Any) -> str:
    """The type in words a recipe's author uses: "integer or null", "list of number", ..."""
    names = {int: "integer", float: "number", str: "text", bool: "true or false", Any: "anything"}
    if annotation in names:
        return names[annotation]
    if annotation is type(None):
        return "null"
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(describe(arg) for arg in args)
    if origin is typing.Literal:
        return " or ".join(repr(arg) for arg in args)
    if origin in (list, tuple) and args:
        return f"list of {describe(args[0])}"
    if is_component(annotation):
        return "component: a mapping with _target_"
    if origin is dict:
        value = args[1]
        inner = "component" if is_component(value) else getattr(value, "__name__", "value")
        return f"mapping of names to {inner}"
    return str(getattr(annotation, "__name__", annotation))


def is_component(annotation: Any) -> bool:
    """True for open mappings, whose keys the schema does not know."""
    return typing.get_origin(annotation) is dict and typing.get_args(annotation) == (str, Any)


@cache
def fields(section: type) -> dict[str, Key]:
    """Keys of one section (a dataclass of the schema), by name, in file order."""
    hints = typing.get_type_hints(section)
    docs = _attribute_docs(section)
    out = {}
    for item in dataclasses.fields(section):
        default = item.default
        if item.default_factory is not dataclasses.MISSING:
            default = item.default_factory()
        if dataclasses.is_dataclass(default):
            default = dataclasses.MISSING
        out[item.name] = Key(item.name, hints[item.name], default, docs.get(item.name, ""))
    return out


def walk(section: type = Config, prefix: str = "") -> Iterator[Key]:
    """Every key of the schema, depth first, with dotted paths; `*` stands for a name."""
    for name, key in fields(section).items():
        path = f"{prefix}{name}"
        yield dataclasses.replace(key, path=path)
        inner = unwrap(key.annotation)
        if dataclasses.is_dataclass(inner) and isinstance(inner, type):
            yield from walk(inner, f"{path}.")
        elif typing.get_origin(inner) is dict:
            value = typing.get_args(inner)[1]
            if dataclasses.is_dataclass(value) and isinstance(value, type):
                yield from walk(value, f"{path}.*.")


def locate(path: str, *, value: object = None, where: str = "") -> Any:
    """Annotation of the key at a dotted path; `Any` for whatever lies inside a component.

    Raises ConfigError when no such key exists; `where` ("in override 'x=1'") goes into the message.
    """
    annotation: Any = Config
    done: list[str] = []
    for part in path.replace("[", ".[").split("."):
        inner = unwrap(annotation)
        if part.startswith("["):  # an element of a list
            annotation = (*typing.get_args(inner), Any)[0]
            continue
        if dataclasses.is_dataclass(inner) and isinstance(inner, type):
            known = fields(inner)
            if part not in known:
                raise _unknown(path, part, done, list(known), value, where)
            annotation = known[part].annotation
        elif is_component(inner) or inner is Any:
            return Any
        elif typing.get_origin(inner) is dict:
            annotation = typing.get_args(inner)[1]
        else:
            raise ConfigError(
                f"no such key{where}: {'.'.join(done)} is {describe(annotation)}, not a section",
                key=path,
                value=value,
                fix=f"set {'.'.join(done)} itself",
            )
        done.append(part)
    return annotation


def _unknown(path: str, part: str, done: list[str], known: list[str], value: object, where: str) -> ConfigError:
    parent = ".".join(done)
    # The right name in the wrong section comes before a similar name in this one.
    same = [key.path for key in walk() if key.path.split(".")[-1] == path.split(".")[-1]]
    near = f" Did you mean {' or '.join(map(repr, same[:3]))}?" if same else nearest(part, known)
    if near and parent and not same:
        near = near.replace(" '", f" '{parent}.")
    near = near or nearest(path, [key.path for key in walk()])
    return ConfigError(
        f"no such key{where}.{near}",
        key=path,
        value=value,
        expected=f"one of {', '.join(known)}" + (f" (in {parent})" if parent else ""),
        fix="python -m rlkit.config.reference lists all keys (docs/config.md)",
    )


def _attribute_docs(section: type) -> dict[str, str]:
    """The strings under the fields of a dataclass, by field name."""
    body = ast.parse(inspect.getsource(section)).body[0]
    assert isinstance(body, ast.ClassDef)
    docs: dict[str, str] = {}
    for before, after in zip(body.body, body.body[1:], strict=False):
        if (
            isinstance(before, ast.AnnAssign)
            and isinstance(before.target, ast.Name)
            and isinstance(after, ast.Expr)
            and isinstance(after.value, ast.Constant)
            and isinstance(after.value.value, str)
        ):
            docs[before.target.id] = inspect.cleandoc(after.value.value)
    return docs
