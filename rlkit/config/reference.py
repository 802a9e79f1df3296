"""The configuration reference, generated from the schema: python -m rlkit.config.reference."""

import inspect
import json
from collections.abc import Iterator
from dataclasses import is_dataclass
from importlib.resources import files
from typing import get_args

from jinja2 import Template
from omegaconf import MISSING

from rlkit.config import keys
from rlkit.config.compose import Library
from rlkit.config.schema import Config


def markdown() -> str:
    """The whole page."""
    places: dict[type, list[str]] = {Config: []}  # where in a recipe each section of the schema stands
    for key in keys.walk():
        inner = keys.unwrap(key.annotation)
        for section, suffix in [(inner, ""), *((argument, ".NAME") for argument in get_args(inner))]:
            if keys.is_section(section):
                places.setdefault(section, []).append(f"`{key.path.replace('*', 'NAME')}{suffix}`")
    text = (files("rlkit.config") / "reference.md.j2").read_text(encoding="utf-8")
    page = Template(text, trim_blocks=True, keep_trailing_newline=True)
    return str(page.render(groups=Library().groups(), places=places, document=inspect.getdoc, rows=_rows))


def _rows(section: type) -> Iterator[tuple[str, str, str, str]]:
    """Name, type, default and meaning of each key."""
    for name, key in keys.fields(section).items():
        kind = ": ".join(filter(None, (keys.describe(key.annotation), key.limits.get("limits"))))
        default = "" if is_dataclass(key.default) else f"`{json.dumps(key.default)}`"
        default = "**mandatory**" if key.default == MISSING else default
        yield f"`{name}`", kind, default, " ".join(key.doc.split()).replace("<", "&lt;")


if __name__ == "__main__":
    print(markdown(), end="")
