"""Settings of a run's processes that do not go together."""

from __future__ import annotations

import pytest

from rlkit.config.compose import load
from rlkit.config.verify import verify
from rlkit.errors import ConfigError

VLLM = "evaluation.engine={_target_: rlkit.rollout.vllm_engine.VllmEngine}"
SHARDED = ["rollout.workers=2", "learner.processes=2", "learner.sharded=true"]
BAD = [
    ("quickstart_async", ["rollout.workers=0"], "rollout.workers"),
    ("quickstart", ["learner.processes=2"], "learner.processes"),
    ("quickstart", ["learner.sharded=true"], "learner.sharded"),
    ("quickstart_likelihood", ["rollout.workers=1", "learner.sharded=true"], "learner.sharded"),
    ("quickstart_likelihood", ["rollout.workers=1", VLLM], "evaluation.engine"),
]


@pytest.mark.parametrize(("recipe", "overrides", "named"), BAD)
def test_they_are_refused(recipe: str, overrides: list[str], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        verify(load(recipe, overrides)[0])


def test_workers_with_either_engine_are_right() -> None:
    for recipe, overrides in (("quickstart_async", []), ("quickstart", SHARDED)):
        verify(load(recipe, overrides)[0])
