"""From a recipe's name and overrides to a checked, typed configuration.

Hydra composes the defaults list; the result is always merged into the typed schema, whatever that list says, so that a
key nobody reads is an error. Overrides of values are merged one by one afterwards: an error can name its override.
"""

import re
from collections.abc import Sequence
from contextlib import suppress
from functools import reduce
from importlib.resources import files
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException, MissingConfigException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from rlkit.config import keys
from rlkit.config.schema import Config
from rlkit.errors import ConfigError, nearest

SCHEMA = "rlkit_schema"
PRIMARY = "rlkit_primary"
LOCAL_FILE = "rlkit.data.sources.LocalFile"
SHIPPED = Path(str(files("recipes")))  # in the package


class Library:
    """Folders with recipes: the user's own, where there is one, then the shipped. ConfigError if it is no folder."""

    def __init__(self, config_dir: Path | None = None) -> None:
        self.folders = [SHIPPED] if config_dir is None else [Path(config_dir).resolve(), SHIPPED]
        if not self.folders[0].is_dir():
            problem, expected = (f"no such folder: {self.folders[0]}", "a folder of recipes, groups in sub-folders")
            raise ConfigError(problem, key="--config-dir", value=str(config_dir), expected=expected)

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


def load(recipe: str, overrides: Sequence[str] = (), config_dir: Path | None = None) -> tuple[Config, dict[str, Any]]:
    """Compose `recipe` with Hydra-style overrides into (typed config, the same as plain dicts).

    Overrides: `key.path=value`, `group=option`, `group/sub=option`, `~component.key`; recipes in `config_dir` come
    before shipped ones. A mapping with `_target_` replaces a component, any other mapping is merged. ConfigError:
    unknown recipe, group, option or key (with the nearest), wrong type, missing mandatory key, malformed file.
    """
    library = Library(config_dir)
    library.find(recipe)
    groups = library.groups()
    choices: dict[str, str] = {}
    changes = []
    for override in map(parsed, overrides):
        name, value, where = override.key_or_group, override.value(), f" in override {override.input_line!r}"
        names_option = not isinstance(value, dict) and value is not None and name in groups
        if (names_option or "/" in name) and not override.is_delete():
            library.find(f"{name}/{value}", where)
            if name in choices:
                problem = f"two options of one group: {name}={choices[name]} and {name}={value}"
                raise ConfigError(problem, key=name, value=value, expected="one of them")
            choices[name] = str(value)
        else:
            keys.locate(name, value=value, where=where)
            changes.append(override)
    composed = _composed(recipe, [f"{name}={value}" for name, value in choices.items()], library)
    return _finished(reduce(_changed, changes, composed))


def parsed(text: str, sweep: bool = False) -> Override:
    """An override by Hydra's grammar, with values to sweep if asked. Raises ConfigError."""
    with suppress(HydraException):  # the message below says more to a user than the grammar's
        override = OverridesParser.create().parse_override(text)
        if (sweep or not override.is_sweep_override()) and override.package is None:
            return override
    expected = "key=value, group=option or ~component.key; key=value,value in a sweep; no packages (a@b)"
    fix = "quote values with special characters: 'key=\"a=b, c\"'; a list: 'key=[1,2]'"
    raise ConfigError(f"override {text!r} cannot be read", expected=expected, fix=fix)


def _composed(recipe: str, choices: list[str], library: Library) -> DictConfig:
    """What Hydra makes of the defaults list, merged into the schema."""
    store = ConfigStore.instance()
    store.store(name=SCHEMA, node=Config, provider="rlkit")
    # The schema comes first in a primary config of our own: no recipe can forget or replace it.
    searchpath = [str(folder) for folder in library.folders[1:]]
    primary = {"defaults": [SCHEMA, f"/{recipe}@_global_", "_self_"], "hydra": {"searchpath": searchpath}}
    store.store(name=PRIMARY, node=primary, provider="rlkit")
    try:
        with initialize_config_dir(str(library.folders[0]), version_base="1.3"):
            composed = compose(PRIMARY, overrides=choices)
        merged = OmegaConf.merge(OmegaConf.structured(Config), composed)
    except RecursionError as error:
        fix = "give your file another name than the one it extends"
        raise ConfigError("this recipe includes itself", key="recipe", value=recipe, fix=fix) from error
    except (HydraException, OmegaConfBaseException, ValueError, YAMLError) as error:
        absent = re.match(r"Could not override '([^']+)'\. No match", str(error))
        if absent and any(choice.startswith(f"{absent[1]}=") for choice in choices):
            # a group that the recipe does not name is added to it
            return _composed(recipe, [re.sub(f"^(?={absent[1]}=)", "+", choice) for choice in choices], library)
        file = re.match(r"(?:In|Invalid defaults list in) '?([^':]+)", str(error))
        where = f" in {library.find(file[1] if file else recipe)}"
        if isinstance(error, MissingConfigException) and error.missing_cfg_file:
            library.find(error.missing_cfg_file, f"{where} or an override of it")
        raise _refused(error, where) from error
    assert isinstance(merged, DictConfig)
    OmegaConf.set_struct(merged, None)  # type: ignore[arg-type]  # inherit: components are open
    return merged


def _changed(config: DictConfig, override: Override) -> DictConfig:
    """The configuration with a value set, or with a key of a component deleted."""
    path, value, where = override.key_or_group, override.value(), f" in override {override.input_line!r}"
    if override.is_delete():
        parent, _, name = path.rpartition(".")
        section = OmegaConf.select(config, parent) if parent else config
        if not isinstance(section, DictConfig) or OmegaConf.get_type(section) is not dict:
            raise ConfigError(f"only keys of a component or of a mapping of names can be deleted{where}")
        if name not in section:
            raise ConfigError(f"nothing to delete{where}", expected=f"one of {', '.join(map(str, section))}")
        del section[name]
        return config
    try:
        if isinstance(value, dict) and "_target_" in value:
            OmegaConf.update(config, path, value, merge=False, force_add=True)
            return config
        merged = OmegaConf.merge(config, reduce(lambda inner, part: {part: inner}, reversed(path.split(".")), value))
    except (OmegaConfBaseException, ValueError) as error:
        raise _refused(error, where, path, value) from error
    assert isinstance(merged, DictConfig)
    return merged


def _finished(config: DictConfig) -> tuple[Config, dict[str, Any]]:
    """Resolve interpolations and `path` shorthands, and check that nothing mandatory is missing."""
    for dataset in [config.data.train, *config.data.eval.values(), *([config.sft.data] if config.sft else [])]:
        if dataset.path is not None:
            dataset.source = {"_target_": LOCAL_FILE, "path": dataset.path}
    try:
        if missing := sorted(OmegaConf.missing_keys(config)):
            ways = [re.sub(r"(.*)\.source$", r"\1.path=FILE or \1.source", key) + "=..." for key in missing]
            problem = f"mandatory keys have no value: {', '.join(missing)}"
            raise ConfigError(problem, fix=f"set {', '.join(ways)}; or choose an option of the group")
        plain: Any = OmegaConf.to_container(config, resolve=True)
        typed: Any = OmegaConf.to_object(config)
    except OmegaConfBaseException as error:
        key, reason = getattr(error, "full_key", None) or None, str(error).partition("\n")[0]
        raise ConfigError(f"interpolation cannot be resolved: {reason}", key=key) from error
    return typed, plain


def _refused(error: BaseException, where: str, path: str = "", value: object = None) -> ConfigError:
    """An error of Hydra or OmegaConf as a ConfigError with key, type and nearest name."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, OmegaConfBaseException):
        cause = cause.__cause__ or cause.__context__
    if cause is None:
        return ConfigError(f"a recipe cannot be read{where}: {error}")
    text = str(cause).partition("\n")[0]
    full = str(getattr(cause, "full_key", None) or path)
    if not full:  # where a whole section is of another kind, OmegaConf names its class
        return ConfigError(f"{text}{where}")
    annotation = keys.locate(full, value=value, where=where)  # raises where the key is unknown
    if value is None and (found := re.match(r"Value '(.*)' of type", text)):
        value = found[1]
    return ConfigError(f"wrong type{where}", key=full, value=value, expected=keys.describe(annotation))
