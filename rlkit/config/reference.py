"""The configuration reference, generated from the schema: python -m rlkit.config.reference."""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any

from omegaconf import MISSING

from rlkit.config import keys, schema
from rlkit.config.values import CHOICES

INTRODUCTION = """\
# Configuration reference

Generated from `rlkit/config/schema.py`: `python -m rlkit.config.reference > docs/config.md`.
Do not edit it by hand; a test compares the two.

A recipe is a YAML file in `recipes/` (or in your own folder: `--config-dir FOLDER`) that chooses an
option of every config group and sets what is particular to it. On the command line:

- `key.path=value` sets a value: `prompts_per_step=64 learner.learning_rate=1e-6`
- `group=option` chooses another file of a group: `algorithm=dr_grpo algorithm/loss=clip_higher`
- `data.train.path=my.jsonl` trains on a local file, whatever the recipe's source is
- `'algorithm.loss={_target_: my_module.MyLoss, width: 3}'` puts your own component in place
- `~algorithm.loss.dual_clip` deletes a component's setting; `sft=null` leaves a section out

A **component** is a mapping with `_target_`, the import path of a dataclass, whose other keys are that
dataclass's fields. Code in the working directory can be named. Unknown keys, groups, options and
component settings are errors that name the nearest that exists. `rlkit check recipe=NAME` prints the
resolved configuration, the derived batch table and a memory estimate, and starts nothing.
"""


def markdown() -> str:
    """The whole page."""
    parts = [INTRODUCTION, _groups()]
    sections = [item for item in vars(schema).values() if _is_section(item)]
    places = _places()
    for section in [schema.Config, *(item for item in sections if item is not schema.Config)]:
        parts.append(_section(section, places[section]))
    return "\n".join(parts)


def _is_section(item: Any) -> bool:
    return inspect.isclass(item) and dataclasses.is_dataclass(item) and item.__module__ == schema.__name__


def _groups() -> str:
    from rlkit.config.library import Library, shipped

    library = Library((shipped(),))
    lines = ["## Shipped recipes and config groups\n", "| group | options |", "|---|---|"]
    lines.append(f"| `recipe` | {', '.join(f'`{name}`' for name in library.recipes())} |")
    for group in library.groups():
        options = ", ".join(f"`{name}`" for name in library.options(group))
        lines.append(f"| `{group}` | {options} |")
    return "\n".join(lines) + "\n"


def _places() -> dict[type, list[str]]:
    """Where in a recipe each section of the schema stands."""
    places: dict[type, list[str]] = {schema.Config: [""]}
    for key in keys.walk():
        inner = keys.unwrap(key.annotation)
        arguments = getattr(inner, "__args__", ())
        for section, suffix in [(inner, ""), *((argument, ".NAME") for argument in arguments)]:
            if _is_section(section):
                places.setdefault(section, []).append(key.path.replace("*", "NAME") + suffix)
    return places


def _section(section: type, places: list[str]) -> str:
    title = " and ".join(f"`{place}`" for place in places) if places != [""] else "Top level"
    lines = [f"## {title}\n", f"{inspect.getdoc(section)}\n", "| key | type | default | meaning |", "|---|---|---|---|"]
    for name, key in keys.fields(section).items():
        doc = " ".join((key.doc or _doc_of(key.annotation)).split())
        place = f"{places[0]}.{name}" if places[0] else name
        if place in CHOICES:
            assert all(choice in doc for choice in CHOICES[place]), f"{place} documents its choices"
        kind = "section" if _is_section(keys.unwrap(key.annotation)) else ""
        kind = kind or keys.describe(key.annotation)
        cells = (f"`{name}`", kind, _default(key.default), doc.replace("<", "&lt;"))
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def _doc_of(annotation: Any) -> str:
    inner = keys.unwrap(annotation)
    return (inspect.getdoc(inner) or "") if _is_section(inner) else ""


def _default(value: Any) -> str:
    if value is dataclasses.MISSING:
        return ""
    if value == MISSING:
        return "**mandatory**"
    if value is None:
        return "`null`"
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    if isinstance(value, dict) and set(value) == {"_target_"}:
        return f"`{value['_target_']}`"
    return f"`{value!r}`".replace("'", '"')


if __name__ == "__main__":
    print(markdown(), end="")
