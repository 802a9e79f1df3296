"""Finding one's way in a configuration: its data sets, its components, what their classes say."""

from __future__ import annotations

from typing import Any

from rlkit.config.components import TARGET, import_target
from rlkit.config.schema import Config, DatasetConfig
from rlkit.errors import ConfigError


def components(config: Config) -> dict[str, dict[str, Any]]:
    """Every component of a configuration but the rewards, by its key."""
    found = {
        "algorithm.advantage": config.algorithm.advantage,
        "algorithm.loss": config.algorithm.loss,
        "algorithm.aggregation": config.algorithm.aggregation,
        "algorithm.kl": config.algorithm.kl,
        "budget": config.budget,
        "old_policy": config.old_policy,
        "rollout.engine": config.rollout.engine,
    }
    for key, dataset in datasets(config).items():
        found[f"{key}.source"] = dataset.source
        if dataset.completion is not None:
            found[f"{key}.completion"] = dataset.completion
    return found


def datasets(config: Config) -> dict[str, DatasetConfig]:
    """Every data set by its key."""
    found = {"data.train": config.data.train}
    found |= {f"data.eval.{name}": dataset for name, dataset in config.data.eval.items()}
    return found if config.sft is None else {**found, "sft.data": config.sft.data}


def get(config: Config, path: str) -> Any:
    """Value at a dotted path; None where a section on the way is null."""
    value: Any = config
    for part in path.split("."):
        value = None if value is None else getattr(value, part)
    return value


def attribute(component: Any, key: str, name: str, default: Any) -> Any:
    """A class attribute of a component's target; the default where it has none."""
    try:
        return getattr(import_target(component[TARGET], key), name, default)
    except (ConfigError, KeyError, TypeError):
        return default  # not a component: reported by verify


def needs_reference(config: Config) -> bool:
    """Whether the KL penalty compares with the model training started from."""
    return bool(attribute(config.algorithm.kl, "algorithm.kl", "needs_reference", False))
