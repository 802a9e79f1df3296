"""Settings of a run's processes that do not go together."""

from __future__ import annotations

import pytest

from rlkit.config.compose import load
from rlkit.config.verify import verify
from rlkit.errors import ConfigError

VLLM = "evaluation.engine={_target_: rlkit.rollout.vllm_engine.VllmEngine}"
BAD = [
    ("quickstart_async", ["rollout.workers=0"], "rollout.workers"),
    ("quickstart", ["learner.processes=2"], "learner.processes"),
    ("quickstart_likelihood", ["rollout.workers=1", VLLM], "evaluation.engine"),
]


@pytest.mark.parametrize(("recipe", "overrides", "named"), BAD)
def test_they_are_refused(recipe: str, overrides: list[str], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        verify(load(recipe, overrides)[0])


def test_workers_with_either_engine_are_right() -> None:
    for recipe, overrides in (("quickstart_async", []), ("quickstart", ["rollout.workers=2", "learner.processes=2"])):
        verify(load(recipe, overrides)[0])
