"""What of a step's groups is trained on."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from rlkit.algorithms.advantages.dr_grpo import MeanCentredAdvantage
from rlkit.algorithms.group_filters.mixed_scores import MixedScores
from rlkit.errors import TrainingError
from rlkit.learner.assemble import assemble
from rlkit.types import Group, Prompt, Rollout, Verdict, VersionSpan


def group(ordinal: int, scores: list[float | None], cut: set[int]) -> Group:
    prompt = Prompt(id=str(ordinal), text="?", token_ids=np.array([1]), reference="1", metadata={})
    rollout = Rollout(
        ordinal=ordinal,
        index=0,
        token_ids=np.array([5, 6]),
        behavior_logprobs=np.zeros(2, dtype=np.float32),
        loss_mask=np.ones(2, dtype=np.bool_),
        segments=np.zeros(2, dtype=np.int64),
        version_spans=(VersionSpan(start=0, end=2, version=0),),
        finish_reason="stop",
        engine_id="test",
        text="1",
    )
    rollouts = [
        dataclasses.replace(rollout, index=i, finish_reason="length" if i in cut else "stop")
        for i in range(len(scores))
    ]
    verdicts = [Verdict(score=score, parts={"a": score}) for score in scores]
    return Group(
        ordinal=ordinal, prompt=prompt, samples=len(scores), rollouts=tuple(rollouts), verdicts=tuple(verdicts)
    )


def test_truncated_completions_count_in_the_advantages_only() -> None:
    """DAPO's overlong filter, arXiv 2503.14476, section 3.4."""
    groups = [group(3, [1.0, 0.0, 0.0, None], {1}), group(7, [1.0, 0.0], {0, 1})]
    plain, metrics = assemble(groups, MeanCentredAdvantage(), 0, {0: 0})
    masked, same = assemble(groups, MeanCentredAdvantage(), 0, {0: 0}, mask_truncated=True)
    assert same == metrics and metrics["completion/truncated_frac"] == 0.5
    advantages = {(s.group, s.index): s.advantage for s in plain}
    assert advantages == pytest.approx({(3, 0): 2 / 3, (3, 1): -1 / 3, (3, 2): -1 / 3, (7, 0): 0.5, (7, 1): -0.5})
    kept = {(s.group, s.index): s.advantage for s in masked}
    left = {key: value for key, value in kept.items() if key[0] == 7}
    assert {key: kept[key] for key in kept if key[0] == 3} == pytest.approx({(3, 0): 2 / 3, (3, 2): -1 / 3})
    assert list(left.values()) == [0.0]  # a group stays, so that a step splits into its updates as before


class Broken:
    minimum_group_size = 2

    def __call__(self, inputs: object) -> torch.Tensor:
        return {}["absent"]  # type: ignore[no-any-return]


def test_an_advantage_that_raises_is_named() -> None:
    with pytest.raises(
        TrainingError, match=r"algorithm.advantage = 'Broken': .*KeyError: 'absent'.*test_assemble"
    ) as e:
        assemble([group(3, [1.0, 0.0], set())], Broken(), 0, {0: 0})
    assert isinstance(e.value.__cause__, KeyError)


@pytest.mark.parametrize(("scores", "kept"), [([1.0, 1.0], False), ([0.0], False), ([0.0, 0.0, 0.1], True)])
def test_mixed_scores(scores: list[float], kept: bool) -> None:
    assert MixedScores()(torch.tensor(scores, dtype=torch.float64)) is kept
