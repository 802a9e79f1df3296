"""The folders recipes come from, and a check of defaults lists that Hydra does not make (hydra issue 1951).

An entry that names nothing, a misspelt `optional group: option` too, is an error with the nearest name that exists.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any, Self

import yaml
from omegaconf import OmegaConf

from rlkit.errors import ConfigError, nearest

KEYWORDS = ("optional", "override")
SHIPPED = Path(str(files("recipes")))  # in the package


@dataclass(frozen=True, slots=True)
class Library:
    """Folders with recipes, the user's own first."""

    folders: tuple[Path, ...]

    @classmethod
    def open(cls, config_dir: Path | None = None) -> Self:
        """The shipped recipes, after those in `config_dir`. ConfigError if that is no folder."""
        if config_dir is None:
            return cls((SHIPPED,))
        folder = Path(config_dir).resolve()
        if not folder.is_dir():
            expected = "a folder of recipes (*.yaml), groups in sub-folders"
            raise ConfigError(f"no such folder: {folder}", key="--config-dir", value=str(config_dir), expected=expected)
        return cls((folder, SHIPPED))

    def options(self, group: str) -> list[str]:
        """Options of a group: its YAML files without the ending. The group "" has the recipes."""
        return sorted({path.stem for folder in self.folders for path in (folder / group).glob("*.yaml")})

    def groups(self) -> list[str]:
        """All groups, as `algorithm` or `algorithm/loss`."""
        found = {path.parent.relative_to(folder) for folder in self.folders for path in folder.rglob("*.yaml")}
        return sorted(group.as_posix() for group in found - {Path()})

    def find(self, name: str) -> Path | None:
        """File of `group/option` or of a recipe; the user's folder wins."""
        paths = (folder / f"{name}.yaml" for folder in self.folders)
        return next((path for path in paths if path.is_file()), None)

    def check(self, name: str, asked: str = "", stack: tuple[str, ...] = ()) -> None:
        """Check a file, its defaults list and every file that names. ConfigError: absent, malformed, in a circle."""
        path = self.find(name)
        if path is None:
            raise self._absent(name, asked)
        if name in stack:
            problem = f"recipe includes itself: {' -> '.join((*stack, name))}"
            raise ConfigError(problem, fix="give your file another name than the one it extends")
        try:
            content = OmegaConf.to_container(OmegaConf.load(path), resolve=False)
        except (yaml.YAMLError, OSError, UnicodeDecodeError, RecursionError) as error:
            raise ConfigError(f"{path} is not readable as YAML: {error}") from error
        if not isinstance(content, dict):
            raise ConfigError(f"{path} holds a {type(content).__name__}, expected a mapping of keys")
        if not isinstance(entries := content.get("defaults", []), list):
            raise ConfigError(f"'defaults' in {path} must be a list of '- group: option'")
        where = f" in the defaults list of {path}"
        for target in (target for entry in entries for target in _targets(entry, name.rpartition("/")[0], where)):
            self.check(target, where, (*stack, name))

    def _absent(self, name: str, where: str) -> ConfigError:
        group, _, option = name.rpartition("/")
        names, kind, key, wanted = self.options(group), "option", group, option
        if not group:
            kind, key, wanted = "recipe", "recipe", option.removesuffix(".yaml")
        elif group not in self.groups():
            names, kind, wanted = self.groups(), "config group", group
        fix = None if group else "your own recipes: --config-dir FOLDER recipe=NAME (without .yaml)"
        problem = f"no such {kind}{where}.{nearest(wanted, names)}"
        return ConfigError(problem, key=key, value=option, expected=f"one of {', '.join(names)}", fix=fix)


def _targets(entry: Any, folder: str, where: str) -> Iterator[str]:
    """Names of the files that an entry of a defaults list in `folder` brings in."""
    if not isinstance(entry, str | dict) or len(entry) != 1 and isinstance(entry, dict):
        expected = "'- group: option', '- override group: option' or '- recipe'"
        raise ConfigError(f"malformed entry {entry!r}{where}", expected=expected)
    head, value = ("", entry) if isinstance(entry, str) else next(iter(entry.items()))
    *words, group = str(head).partition("@")[0].split(" ")
    for word in words:
        if word not in KEYWORDS:
            problem = f"unknown keyword {word!r}{where}.{nearest(word, KEYWORDS)}"
            raise ConfigError(problem, key=str(head), value=value, expected=" or ".join(KEYWORDS))
    for option in value if isinstance(value, list) else [value]:
        if option in (None, "_self_", "???") or "${" in str(option):
            continue
        name = f"{group}/{option}" if group else option.partition("@")[0]
        # Relative to the folder of the file, unless it starts with a slash.
        yield name.lstrip("/") if name.startswith("/") or not folder else f"{folder}/{name}"
