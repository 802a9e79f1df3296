"""The configuration reference, generated from the schema: python -m rlkit.config.reference."""

import inspect
import json
from collections.abc import Iterable
from dataclasses import is_dataclass
from typing import get_args

from omegaconf import MISSING

from rlkit.config import keys
from rlkit.config.library import Library
from rlkit.config.schema import Config

INTRODUCTION = """\
# Configuration reference

Generated from `rlkit/config/schema.py`: `python -m rlkit.config.reference > docs/config.md`. Do not edit it by hand.

A recipe is a YAML file in `recipes/` (or in your own folder: `--config-dir FOLDER`) that chooses an option of every
config group and sets what is particular to it. On the command line:

- `key.path=value` sets a value: `prompts_per_step=64 learner.learning_rate=1e-6`
- `group=option` chooses another file of a group: `algorithm=dr_grpo algorithm/loss=clip_higher`
- `data.train.path=my.jsonl` trains on a local file, whatever the recipe's source is
- `'algorithm.loss={_target_: my_module.MyLoss, width: 3}'` puts your own component in place
- `~algorithm.loss.dual_clip` deletes a component's setting; `sft=null` leaves a section out

A **component** is a mapping with `_target_`, the import path of a dataclass, whose other keys are that dataclass's
fields. Code in the working directory can be named. Unknown keys, groups, options and component settings are errors that
name the nearest that exists. `rlkit check recipe=NAME` shows what a configuration comes to and starts nothing.

A run goes on only with the recipe and data it began with. Free to change on resume: `steps`, `name`, `output_dir`,
`resume`, `telemetry.*`, `checkpoint.*`, `evaluation.{every_steps,at_start,batch_samples}` and
`reward.{workers,timeout_s,sandbox,max_unscored_frac}`.
"""


def markdown() -> str:
    """The whole page."""
    library = Library.open()
    groups = ", ".join(f"`{group}`" for group in library.groups())
    places: dict[type, list[str]] = {Config: [""]}  # where in a recipe each section of the schema stands
    for key in keys.walk():
        inner = keys.unwrap(key.annotation)
        for section, suffix in [(inner, ""), *((argument, ".NAME") for argument in get_args(inner))]:
            if keys.is_section(section):
                places.setdefault(section, []).append(key.path.replace("*", "NAME") + suffix)
    found = f"Config groups, whose options are the files of `recipes/GROUP/`: {groups}.\n"
    return "\n".join([INTRODUCTION, found, *(_section(section, there) for section, there in places.items())])


def _table(title: str, columns: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    columns = list(columns)
    lines = [" | ".join(cell.replace("|", "\\|") for cell in row) for row in (columns, ["---"] * len(columns), *rows)]
    return f"## {title}\n" + "".join(f"| {line} |\n" for line in lines)


def _section(section: type, places: list[str]) -> str:
    title = " and ".join(f"`{place}`" for place in places) if places != [""] else "Top level"
    rows = []
    for name, key in keys.fields(section).items():
        limits = key.limits.get("limits", "")
        kind = keys.describe(key.annotation) + (f": {limits}" if limits else "")
        default = "" if is_dataclass(key.default) else f"`{json.dumps(key.default)}`"
        default = "**mandatory**" if key.default == MISSING else default
        rows.append((f"`{name}`", kind, default, " ".join(key.doc.split()).replace("<", "&lt;")))
    return _table(f"{title}\n\n{inspect.getdoc(section)}\n", ("key", "type", "default", "meaning"), rows)


if __name__ == "__main__":
    print(markdown(), end="")
