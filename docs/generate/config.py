"""docs/config.md from the schema: python docs/generate/config.py > docs/config.md."""

import inspect
import json
from collections.abc import Iterator
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from typing import get_args, get_type_hints

import omegaconf
from jinja2 import Template

from rlkit.config import keys
from rlkit.config.compose import Library
from rlkit.config.schema import Config
from rlkit.rollout.transformers_engine import TransformersEngine
from rlkit.rollout.vllm_engine import VllmEngine


def markdown() -> str:
    """The whole page."""
    places: dict[type, list[str]] = {Config: []}  # where in a recipe each section of the schema stands
    for path, field in keys.walk():
        inner = keys.unwrap(field.type)
        for section, suffix in [(inner, ""), *((argument, ".NAME") for argument in get_args(inner))]:
            if keys.is_section(section):
                places.setdefault(section, []).append(f"`{path.replace('*', 'NAME')}{suffix}`")
    places |= {TransformersEngine: ["`rollout.engine` (`rollout=embedded`)"]}
    places |= {VllmEngine: ["`rollout.engine` (`rollout=vllm`)"]}
    text = Path(__file__).with_suffix(".md.j2").read_text(encoding="utf-8")
    page = Template(text, trim_blocks=True, keep_trailing_newline=True)
    return str(page.render(groups=Library().groups(), places=places, document=inspect.getdoc, rows=_rows))


def _rows(section: type) -> Iterator[tuple[str, str, str, str]]:
    """Name, type, default and meaning of each key."""
    types = get_type_hints(section)
    for field in fields(section):
        value = field.default if field.default_factory is MISSING else field.default_factory()
        kind = ": ".join(filter(None, (keys.describe(types[field.name]), field.metadata.get("limits"))))
        default = "" if is_dataclass(value) else f"`{json.dumps(value)}`"
        default = "**mandatory**" if value == omegaconf.MISSING else default
        doc = keys.comments(section).get(field.name) or inspect.getdoc(types[field.name]) or ""
        yield f"`{field.name}`", kind, default, " ".join(doc.split()).replace("<", "&lt;")


if __name__ == "__main__":
    print(markdown(), end="")
