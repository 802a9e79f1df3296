"""config.yaml of a run folder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from rlkit.errors import RlkitError


class RunError(RlkitError):
    """A run folder cannot be read."""


def read_config(run_dir: Path) -> tuple[Mapping[str, Any] | None, str | None]:
    """The recipe as plain containers, and its text; None and None where there is no config.yaml.

    Raises:
        RunError: the file is not a YAML mapping.
    """
    path = run_dir / "config.yaml"
    if not path.exists():
        return None, None
    text = path.read_text()
    try:
        config = OmegaConf.to_container(OmegaConf.create(text), resolve=False)
    except (OmegaConfBaseException, YAMLError) as error:
        problem = f"config.yaml is not readable: {error}"
        raise RunError(problem, key="run", value=run_dir.name) from error
    if not isinstance(config, dict):
        raise RunError("config.yaml is not a mapping", key="run", value=run_dir.name)
    return {str(key): value for key, value in config.items()}, text
