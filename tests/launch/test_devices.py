"""Which process gets which GPU."""

from __future__ import annotations

import pytest

from rlkit.config.compose import load
from rlkit.errors import ConfigError
from rlkit.launch.devices import VISIBLE, assign
from rlkit.launch.supervisor import Part

TURNS = "rollout.engine.takes_turns=true"
NAMES = ("learner", "worker-0", "worker-1", "evaluator")
PARTS = [Part(name=name, command=["true"], environment={"A": "b"}) for name in NAMES]


def placed(gpus: list[str], *more: str) -> dict[str, str | None]:
    config, _ = load("quickstart_async", ["rollout.workers=2", "learner.processes=2", *more])
    found = assign(config, PARTS, gpus)
    assert all(part.environment["A"] == "b" for part in found)
    return {part.name: part.environment.get(VISIBLE) for part in found}


def test_every_process_has_devices_of_its_own() -> None:
    found = placed([*"01234567"], "rollout.engine.tensor_parallel_size=2")
    assert found == {"learner": "0,1", "worker-0": "2,3", "worker-1": "4,5", "evaluator": "6"}


def test_one_device_is_shared_and_none_is_none() -> None:
    assert placed(["3"])["worker-1"] == "3"
    assert set(placed([]).values()) == {None}


def test_devices_taken_in_turn_are_the_first_ones() -> None:
    found = placed([*"01"], "learner.processes=1", "rollout.engine.takes_turns=true")
    assert set(found.values()) == {"0"}
    found = placed([*"012"], "learner.processes=1", "rollout.engine={takes_turns: true, tensor_parallel_size: 2}")
    assert found == {"learner": "0", "worker-0": "0,1", "worker-1": "0,1", "evaluator": "0"}


@pytest.mark.parametrize(
    ("gpus", "more"), [([], []), (["0"], []), ([*"01234567"], ["learner.device=cpu"]), ([*"01234567"], [TURNS])]
)
def test_nccl_is_refused_where_learner_and_servers_have_no_gpus_of_their_own(gpus, more) -> None:
    with pytest.raises(ConfigError, match=r"rollout\.engine\.weight_transfer"):
        placed(gpus, "rollout.engine.weight_transfer=nccl", *more)


def test_nccl_goes_with_gpus_of_their_own() -> None:
    assert placed([*"01234567"], "rollout.engine.weight_transfer=nccl")["worker-0"] == "2"


def test_too_few_devices_are_named() -> None:
    with pytest.raises(ConfigError, match="5: 2 learner, 1 worker-0, 1 worker-1, 1 evaluator"):
        placed(["0", "1", "2"])
