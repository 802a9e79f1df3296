"""The folders recipes come from."""

from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Self

from rlkit.errors import ConfigError, nearest

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

    def groups(self) -> list[str]:
        """All groups, as `algorithm` or `algorithm/loss`."""
        found = {path.parent.relative_to(folder) for folder in self.folders for path in folder.rglob("*.yaml")}
        return sorted(group.as_posix() for group in found - {Path()})

    def options(self, group: str) -> list[str]:
        """Options of a group: its YAML files without the ending. The group "" has the recipes."""
        return sorted({path.stem for folder in self.folders for path in (folder / group).glob("*.yaml")})

    def find(self, name: str, where: str = "") -> Path:
        """File of `group/option` or of a recipe; the user's folder wins. ConfigError, with the nearest, if absent."""
        paths = [path for folder in self.folders if (path := folder / f"{name}.yaml").is_file()]
        if paths:
            return paths[0]
        group, _, option = name.rpartition("/")
        kind, key, wanted = "option" if group else "recipe", group or "recipe", option.removesuffix(".yaml")
        names, groups = self.options(group), self.groups()
        if group and group not in groups:
            names, kind, wanted = groups, "config group", group
        fix = None if group else "your own recipes: --config-dir FOLDER recipe=NAME (without .yaml)"
        problem = f"no such {kind}{where}.{nearest(wanted, names)}"
        raise ConfigError(problem, key=key, value=option, expected=f"one of {', '.join(names)}", fix=fix)
