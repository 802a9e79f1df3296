"""The folders recipes come from, and a check of defaults lists that Hydra itself does not make.

Hydra ignores a misspelt `optional group: option` and unknown keywords without a word (hydra issue
1951); here every entry that names nothing is an error with the nearest name that exists.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf

from rlkit.errors import ConfigError, nearest

KEYWORDS = ("optional", "override")


def shipped() -> Path:
    """Folder of the recipes in the package."""
    return Path(str(files("recipes")))


@dataclass(frozen=True, slots=True)
class Library:
    """Folders with recipes, the user's own first."""

    folders: tuple[Path, ...]

    @classmethod
    def open(cls, config_dir: Path | None = None) -> Library:
        """The shipped recipes, after those in `config_dir`. ConfigError if that is no folder."""
        if config_dir is None:
            return cls((shipped(),))
        folder = Path(config_dir).resolve()
        if not folder.is_dir():
            raise ConfigError(
                f"no such folder (looked at {folder})",
                key="--config-dir",
                value=str(config_dir),
                expected="a folder with recipes (*.yaml), groups in sub-folders",
            )
        return cls((folder, shipped()))

    def recipes(self) -> list[str]:
        """Names of all experiments."""
        return self.options("")

    def options(self, group: str) -> list[str]:
        """Options of a group: its YAML files without the ending."""
        found = {path.stem for folder in self.folders for path in (folder / group).glob("*.yaml")}
        return sorted(found)

    def groups(self) -> list[str]:
        """All groups, as `algorithm` or `algorithm/loss`."""
        found = {
            path.parent.relative_to(folder).as_posix() for folder in self.folders for path in folder.rglob("*.yaml")
        }
        return sorted(found - {"."})

    def find(self, name: str) -> Path | None:
        """File of `group/option` or of a recipe; the user's folder wins."""
        for folder in self.folders:
            path = folder / f"{name}.yaml"
            if path.is_file():
                return path
        return None

    def read(self, name: str) -> Any:
        """Parsed content of a file that exists. ConfigError if it is not YAML."""
        path = self.find(name)
        assert path is not None, name
        try:
            return OmegaConf.to_container(OmegaConf.load(path), resolve=False)
        except (yaml.YAMLError, OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"{path} is not readable as YAML: {error}") from error

    def require_recipe(self, recipe: str) -> None:
        """ConfigError unless an experiment of this name exists."""
        if recipe.startswith("/") or ".." in recipe.split("/") or self.find(recipe) is None:
            names = self.recipes()
            fix = "your own recipes: --config-dir FOLDER recipe=NAME (without .yaml)"
            near = nearest(recipe.removesuffix(".yaml"), names)
            raise ConfigError(
                f"no such recipe.{near}", key="recipe", value=recipe, expected=f"one of {', '.join(names)}", fix=fix
            )

    def require_option(self, group: str, option: str, where: str) -> None:
        """ConfigError unless `group` and its `option` exist; `where` says who asks."""
        groups = self.groups()
        if group not in groups:
            raise ConfigError(
                f"no such config group{where}.{nearest(group, groups)}",
                key=group,
                value=option,
                expected=f"one of {', '.join(groups)}",
            )
        if self.find(f"{group}/{option}") is None:
            options = self.options(group)
            raise ConfigError(
                f"no such option{where}.{nearest(option, options)}",
                key=group,
                value=option,
                expected=f"one of {', '.join(options)}",
            )

    def check(self, recipe: str, choices: Mapping[str, str]) -> None:
        """Check the defaults lists of a recipe, of `choices` (group -> option) and of what they name.

        Raises ConfigError for an entry that names nothing, is malformed, or includes itself.
        """
        self._check_file(recipe, ())
        for group, option in choices.items():
            self.require_option(group, option, f" in override '{group}={option}'")
            self._check_file(f"{group}/{option}", ())

    def _check_file(self, name: str, stack: tuple[str, ...]) -> None:
        if name in stack:
            raise ConfigError(
                f"recipe includes itself: {' -> '.join((*stack, name))}",
                fix="give your file another name than the one it extends",
            )
        content = self.read(name)
        path = self.find(name)
        if content is None:
            return
        if not isinstance(content, dict):
            raise ConfigError(f"{path} holds a {type(content).__name__}, expected a mapping of keys")
        entries = content.get("defaults", [])
        if not isinstance(entries, list):
            raise ConfigError(f"'defaults' in {path} must be a list of '- group: option'")
        for entry in entries:
            for target in self._targets(entry, name, path):
                self._check_file(target, (*stack, name))

    def _targets(self, entry: Any, name: str, path: Path | None) -> Iterable[str]:
        """Files that one entry of a defaults list brings in."""
        where = f" in the defaults list of {path}"
        folder = name.rpartition("/")[0]
        if isinstance(entry, str):
            if entry == "_self_" or "${" in entry:
                return
            target = _absolute(entry.partition("@")[0], folder)
            if self.find(target) is None:
                group, _, option = target.rpartition("/")
                if group:
                    self.require_option(group, option, where)
                names = self.recipes()
                raise ConfigError(
                    f"no such recipe{where}.{nearest(target, names)}",
                    key="defaults",
                    value=entry,
                    expected=f"one of {', '.join(names)}",
                )
            yield target
            return
        if not isinstance(entry, dict) or len(entry) != 1:
            raise ConfigError(
                f"malformed entry {entry!r}{where}",
                expected="'- group: option', '- override group: option' or '- recipe'",
            )
        ((head, value),) = entry.items()
        *words, group = str(head).split()
        for word in words:
            if word not in KEYWORDS:
                raise ConfigError(
                    f"unknown keyword {word!r}{where}.{nearest(word, KEYWORDS)}",
                    key=str(head),
                    value=value,
                    expected=" or ".join(KEYWORDS),
                )
        if value is None or (isinstance(value, str) and ("${" in value or value == "???")):
            return
        group = _absolute(group.partition("@")[0], folder)
        for option in value if isinstance(value, list) else [value]:
            self.require_option(group, str(option), where)
            yield f"{group}/{option}"


def _absolute(path: str, folder: str) -> str:
    """Entry of a defaults list in `folder`: relative to it, unless it starts with a slash."""
    return path.lstrip("/") if path.startswith("/") or not folder else f"{folder}/{path}"
