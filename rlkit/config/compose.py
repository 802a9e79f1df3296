"""From a recipe's name and overrides to a checked, typed configuration.

Hydra composes the defaults list; the result is always merged into the typed schema, whatever that
list says, so that a key nobody reads is an error. Overrides of values are merged one by one
afterwards, so that an error can name its override.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigKeyError, OmegaConfBaseException

from rlkit.config import keys
from rlkit.config.library import Library
from rlkit.config.schema import Config
from rlkit.errors import ConfigError

SCHEMA = "rlkit_schema"
PRIMARY = "rlkit_primary"
LOCAL_FILE = "rlkit.data.sources.LocalFile"


@dataclass(frozen=True, slots=True)
class _Change:
    """One override of a value: `text` as written, set `path` to `value` (or delete it)."""

    text: str
    path: str
    value: Any
    delete: bool


def load(recipe: str, overrides: Sequence[str] = (), config_dir: Path | None = None) -> tuple[Config, dict[str, Any]]:
    """Compose `recipe` with Hydra-style overrides into (typed config, the same as plain dicts).

    Overrides: `key.path=value`, `group=option`, `group/sub=option`, `~component.key`. Recipes are
    looked up in `config_dir` first, then among the shipped ones. A mapping with `_target_` as value
    replaces a component; any other mapping is merged.

    Raises:
        ConfigError: unknown recipe, group, option or key (with the nearest that exists), value of
            the wrong type, missing mandatory key, malformed file.
    """
    library = Library.open(config_dir)
    library.require_recipe(recipe)
    choices, changes = _sort(overrides, library)
    library.check(recipe, {g: o for g, o in choices.items() if o is not None})
    config = _compose(recipe, choices, library)
    for change in changes:
        config = _apply(config, change)
    return finish(config)


def load_file(path: Path) -> tuple[Config, dict[str, Any]]:
    """Read back a resolved configuration, e.g. a run folder's config.yaml. Raises ConfigError."""
    try:
        read = OmegaConf.load(path)
        merged = OmegaConf.merge(OmegaConf.structured(Config), read)
    except OmegaConfBaseException as error:
        _raise(error, f" in {path}")
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} is not a readable configuration: {error}") from error
    assert isinstance(merged, DictConfig)
    return finish(merged)


def finish(config: DictConfig) -> tuple[Config, dict[str, Any]]:
    """Resolve interpolations and `path` shorthands, and check that nothing mandatory is missing."""
    for dataset in _datasets(config).values():
        if dataset.path is not None:
            dataset.source = {"_target_": LOCAL_FILE, "path": dataset.path}
    try:
        missing = sorted(OmegaConf.missing_keys(config))
        if missing:
            raise _missing(missing)
        plain = OmegaConf.to_container(config, resolve=True)
        typed = OmegaConf.to_object(config)
    except OmegaConfBaseException as error:
        raise ConfigError(
            f"interpolation cannot be resolved: {_first_line(error)}", key=getattr(error, "full_key", None) or None
        ) from error
    assert isinstance(typed, Config) and isinstance(plain, dict)
    return typed, {str(key): value for key, value in plain.items()}


def _missing(missing: list[str]) -> ConfigError:
    described = [f"{key} ({keys.describe(keys.locate(key))})" for key in missing]
    fixes = [f"{key}=..." for key in missing]
    for number, key in enumerate(missing):
        section, _, name = key.rpartition(".")
        if name == "source":
            fixes[number] = f"{section}.path=FILE (.jsonl, .json, .parquet) or {key}={{...}}"
    return ConfigError(
        f"mandatory keys have no value: {', '.join(described)}",
        fix=f"set {' and '.join(fixes)}, or choose an option of the group in the defaults list",
    )


def _datasets(config: DictConfig) -> dict[str, DictConfig]:
    found = {"data.train": config.data.train}
    found |= {f"data.eval.{name}": dataset for name, dataset in config.data.eval.items()}
    return found if config.sft is None else {**found, "sft.data": config.sft.data}


def _sort(overrides: Sequence[str], library: Library) -> tuple[dict[str, str | None], list[_Change]]:
    """Split overrides into choices of group options and changes of values; refuse unknown names."""
    parser = OverridesParser.create()
    groups = set(library.groups())
    choices: dict[str, str | None] = {}
    changes: list[_Change] = []
    for text in overrides:
        try:
            override = parser.parse_overrides([text])[0]
        except HydraException as error:
            raise ConfigError(
                f"override {text!r} cannot be read",
                expected="key=value, group=option or ~component.key",
                fix="quote values with special characters: 'key=\"a=b, c\"'; a list: 'key=[1,2]'",
            ) from error
        if override.is_sweep_override():
            raise ConfigError(
                "a list of values to sweep over is not supported",
                key=override.key_or_group,
                value=text.partition("=")[2],
                fix=f"one run at a time; for a list write '{override.key_or_group}=[...]'",
            )
        name = override.key_or_group
        value = override.value()
        if override.package is not None:
            raise ConfigError(f"override {text!r} names a package (@), which is for defaults lists only")
        is_value = isinstance(value, dict) or (value is None and "/" not in name)
        if name in groups and not is_value:
            choices[name] = _option(name, override, library)
        elif "/" in name:
            library.require_option(name, str(value), f" in override {text!r}")
        else:
            keys.locate(name, value=value, where=f" in override {text!r}")
            changes.append(_Change(text, name, value, override.is_delete()))
    return choices, changes


def _option(group: str, override: Override, library: Library) -> str | None:
    option = override.value()
    if override.is_delete() or not isinstance(option, str):
        raise ConfigError(
            f"cannot choose from a config group like this (in override {override.input_line!r})",
            key=group,
            value=option,
            expected=f"one of {', '.join(library.options(group))}",
        )
    library.require_option(group, option, f" in override {override.input_line!r}")
    return option


def _compose(recipe: str, choices: dict[str, str | None], library: Library) -> DictConfig:
    store = ConfigStore.instance()
    store.store(name=SCHEMA, node=Config, provider="rlkit")
    # The schema comes first in a primary config of our own: no recipe can forget or replace it.
    primary = {
        "defaults": [SCHEMA, f"/{recipe}@_global_", "_self_"],
        "hydra": {"searchpath": [str(folder) for folder in library.folders[1:]]},
    }
    store.store(name=PRIMARY, node=primary, provider="rlkit")
    overrides = [f"{group}={option}" for group, option in choices.items()]
    try:
        with initialize_config_dir(str(library.folders[0]), version_base="1.3"):
            composed = compose(PRIMARY, overrides=overrides)
        merged = OmegaConf.merge(OmegaConf.structured(Config), composed)
    except (HydraException, OmegaConfBaseException, ValueError) as error:
        _raise(error, _where(error, library))
    assert isinstance(merged, DictConfig)
    OmegaConf.set_struct(merged, None)  # type: ignore[arg-type]  # inherit: components are open
    return merged


def _apply(config: DictConfig, change: _Change) -> DictConfig:
    where = f" in override {change.text!r}"
    parts = change.path.split(".")
    if change.delete:
        return _delete(config, change, where)
    nested: Any = change.value
    for part in reversed(parts):
        nested = {part: nested}
    config = copy.deepcopy(config)
    try:
        if isinstance(change.value, dict) and "_target_" in change.value:
            OmegaConf.update(config, change.path, change.value, merge=False, force_add=True)
            return config
        merged = OmegaConf.merge(config, nested)
    except (OmegaConfBaseException, ValueError) as error:
        _raise(error, where, change.path, change.value)
    assert isinstance(merged, DictConfig)
    return merged


def _delete(config: DictConfig, change: _Change, where: str) -> DictConfig:
    parent_path, _, name = change.path.rpartition(".")
    config = copy.deepcopy(config)
    parent = OmegaConf.select(config, parent_path) if parent_path else config
    if not isinstance(parent, DictConfig) or OmegaConf.get_type(parent) is not dict:
        raise ConfigError(f"only keys of a component or of a mapping of names can be deleted{where}")
    if name not in parent:
        raise ConfigError(f"nothing to delete{where}", expected=f"one of {', '.join(map(str, parent))}")
    del parent[name]
    return config


def _where(error: BaseException, library: Library) -> str:
    found = re.match(r"In '([^']+)'", str(error))
    if found is None:
        return ""
    return f" in {library.find(found.group(1)) or found.group(1)}"


def _raise(error: BaseException, where: str, path: str | None = None, value: object = None) -> NoReturn:
    """Turn an error of Hydra or OmegaConf into a ConfigError with key, type and nearest name."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, OmegaConfBaseException):
        cause = cause.__cause__ or cause.__context__
    if cause is None:
        text = str(error).split("\nConfig search path:")[0]
        raise ConfigError(f"{text}{where if where not in text else ''}") from error
    full = str(getattr(cause, "full_key", None) or "") or path
    if full is None:
        # A whole section of another kind: OmegaConf names its class, not its key.
        section = re.search(r"(\w+) is not a subclass of (\w+)\. value: (.*)", _first_line(cause))
        for key in keys.walk() if section else ():
            if section and getattr(keys.unwrap(key.annotation), "__name__", "") == section[2]:
                raise ConfigError(
                    f"wrong type{where}", key=key.path, value=section[3], expected="a section: keys"
                ) from error
        raise ConfigError(f"{_first_line(cause)}{where}") from error
    annotation = keys.locate(full, value=value, where=where)  # raises where the key is unknown
    shown = value
    found = re.match(r"Value '(.*)' of type", _first_line(cause))
    if shown is None and found is not None:
        shown = found.group(1)
    if isinstance(cause, ConfigKeyError):
        raise ConfigError(f"{_first_line(cause)}{where}", key=full, value=shown) from error
    raise ConfigError(f"wrong type{where}", key=full, value=shown, expected=keys.describe(annotation)) from error


def _first_line(error: BaseException) -> str:
    return str(error).split("\n", 1)[0]
