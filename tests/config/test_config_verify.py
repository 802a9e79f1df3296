"""Checks across keys: each fault is found before anything starts, and named."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from rlkit.config import keys
from rlkit.config.compose import load
from rlkit.config.schema import Config
from rlkit.config.verify import problems, verify
from rlkit.errors import ConfigError

Smoke = Callable[..., Config]
Plugin = Callable[[str], str]
Refused = Callable[..., AbstractContextManager[None]]


def test_the_smoke_recipe_is_sound(smoke: Smoke) -> None:
    verify(smoke())


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        (["model.architecture=null"], ("model.path, model.architecture", "neither")),
        (["model.path=somewhere"], ("model.path, model.architecture", "both")),
        (["model.tokenizer=somewhere"], ("model.alphabet", "tokenizer as well")),
        (["model.alphabet=null"], ("model.tokenizer", "model.alphabet")),
        (["data.train.system=Be brief.", "data.train.chat=false"], ("data.train.system",)),
        (["samples_per_prompt=1"], ("samples_per_prompt", "2 or more")),
        (["budget=knapsack", "budget.low=9"], ("budget.low = 9", "samples_per_prompt=4", "budget.low=4")),
        (["budget=knapsack", "budget.high=3"], ("budget.high = 3", "samples_per_prompt=4", "budget.high=4")),
        (["budget=knapsack", "budget.low=1"], ("budget.low = 1", "2 or more")),
        (["budget=knapsack", "budget.minimum=17"], ("minimum", "window=16")),
        (["learner.updates_per_step=3"], ("learner.updates_per_step", "a divisor of prompts_per_step")),
        (["rollout.top_p=0.9"], ("rollout.top_p", "biases")),
        (["rollout.top_k=50"], ("rollout.top_k", "biases")),
        (["rollout.temperature=0"], ("rollout.temperature", "0.01 to inf", "greedy")),
        (["rollout.stop=['']"], ("rollout.stop",)),
        (["max_staleness=1", "old_policy=recompute"], ("max_staleness", "old_policy=rollout")),
        (["reward.rewards.correct.weight=heavy"], ("'correct'", "weight='heavy'")),
        (["reward.rewards.correct.weight=inf"], ("'correct'", "finite")),
        (["reward.rewards.correct.weight=0"], ("every reward has weight 0",)),
        (["~reward.rewards.correct"], ("reward.rewards", "is empty")),
        (["reward=logprob", "algorithm/advantage=jepo"], ("algorithm.advantage", "reward=jepo")),
        (["reward=jepo"], ("algorithm.advantage", "algorithm=jepo")),
        (["reward=jepo", "algorithm=jepo", "reward.likelihood.weight=2"], ("reward.likelihood", "nothing else")),
        (["reward=jepo", "algorithm=jepo", "algorithm/kl=in_reward"], ("algorithm.kl", "nothing taken off")),
        (["reward=jepo", "algorithm=jepo", "algorithm/loss=clipped", "max_staleness=1"], ("max_staleness", "Jepo")),
        (["reward=logprob", "algorithm/group_filter=mixed_scores"], ("algorithm.group_filter", "likelihoods")),
        (["reward=logprob", "budget=knapsack", "budget.high=8"], ("budget", "likelihoods")),
        (["reward=rlpr", "reward.likelihood.answer_gradient=true"], ("reward.likelihood", "answer_gradient")),
        (["reward=logprob", "reward.likelihood.delimiter=''"], ("reward.likelihood", "delimiter")),
        (["reward=rlpr", "reward.rewards.format.weight=0"], ("evaluation.part", "format")),
        (["reward.rewards.correct.extrct=boxed"], ("'extract'",)),
        (["reward.rewards.correct.extract=bxed"], ("reward.rewards", "'correct'", "bxed")),
        (["evaluation.temperature=0"], ("evaluation.samples", "greedy")),
        (["evaluation.every_steps=2"], ("evaluation.every_steps", "held-out")),
        (["evaluation.part=corect"], ("evaluation.part", "'correct'")),
        (["algorithm.loss.clip_low=2"], ("algorithm.loss", "clip_low")),
        (["algorithm.loss.clip_lw=0.1"], ("algorithm.loss.clip_lw", "'clip_low'")),
        (["algorithm/kl=reference", "algorithm.kl.estimator=k1"], ("algorithm.kl", "k2")),
        (["rollout.engine.compact_every=0"], ("rollout.engine", "compact_every")),
        (["rollout.engine._target_=nowhere.Engine"], ("rollout.engine._target_", "nowhere")),
        (["data.train.path=missing.jsonl"], ("data.train.path", "no such file")),
        (
            ["rollout.max_completion_tokens=2000", "learner.max_tokens_per_microbatch=4096"],
            ("max_position_embeddings=2048",),
        ),
        (["learner.max_tokens_per_microbatch=64"], ("learner.max_tokens_per_microbatch", "1088")),
        (["learner.schedule=cosin"], ("learner.schedule", "'cosine'", "constant, linear, cosine")),
        (["learner.betas=[0.9]"], ("learner.betas",)),
        (["learner.betas=[0.9,1.0]"], ("learner.betas",)),
        (["name=../up"], ("name", "folder")),
        (["learner.learning_rate=nan"], ("learner.learning_rate",)),
        (
            ["algorithm=noise_forward", "reward.rewards.correct.weight=0.5"],
            ("reward.rewards", "one reward of weight 1"),
        ),
        (
            ["algorithm=noise_backward", "algorithm/kl=in_reward"],
            ("algorithm.kl", "nothing taken off", "algorithm/kl=none"),
        ),
        (["algorithm=bnpo", "algorithm/kl=in_reward"], ("algorithm.kl", "nothing taken off")),
        (["algorithm=bnpo", "algorithm.advantage.rewards=[corect]"], ("algorithm.advantage", "'correct'")),
        (["algorithm=noise_forward", "algorithm.advantage.estimate=apeal"], ("algorithm.advantage", "apeal")),
        (["algorithm=noise_forward", "algorithm.advantage.false_negative_rate=0.9"], ("sum below 1",)),
    ],
)
def test_fault(smoke: Smoke, overrides: list[str], parts: tuple[str, ...], refused: Refused) -> None:
    config = smoke(*overrides)
    assert len(list(problems(config))) == 1
    with refused(*parts):
        verify(config)


def test_all_faults_are_named_at_once(smoke: Smoke, refused: Refused) -> None:
    config = smoke("samples_per_prompt=1", "rollout.top_p=0.9", "steps=0")
    with refused("3 problems", "samples_per_prompt = 1", "rollout.top_p = 0.9", "steps = 0"):
        verify(config)


SCHEMA = dict(keys.walk())
CHOICES = {path: key.metadata["choices"] for path, key in SCHEMA.items() if "choices" in key.metadata}


@pytest.mark.parametrize("path", CHOICES)
def test_choices(path: str, refused: Refused) -> None:
    config, _ = load("quickstart", [f"{path}=bogus"])
    with refused(f"{path} = 'bogus'", *CHOICES[path]):
        verify(config)
    for choice in CHOICES[path]:
        verify(load("quickstart", [f"{path}='{choice}'"])[0])


NUMBERS = [path for path, key in SCHEMA.items() if keys.unwrap(key.type) in (int, float)]


@pytest.mark.parametrize("path", NUMBERS)
def test_every_number_of_the_schema_has_a_range(path: str, refused: Refused) -> None:
    low = SCHEMA[path].metadata["low"]
    kind = keys.unwrap(SCHEMA[path].type)
    value = -1 if kind is int else "nan" if low == -math.inf else low - 0.001
    name = path.replace("*", "heldout")
    with refused(f"{name} = {value}", "not allowed", SCHEMA[path].metadata["limits"]):
        verify(load("quickstart", [f"{name}={value}"])[0])


def test_a_warm_start_needs_a_teacher(refused: Refused) -> None:
    with refused("sft.data.completion", "sft=null"):
        verify(load("quickstart", ["sft.data.completion=null"])[0])
    verify(load("quickstart", ["sft=null"])[0])


def test_group_size_and_lag_are_read_off_the_class(plugin: Plugin, smoke: Smoke, refused: Refused) -> None:
    module = plugin(
        """
        class NeedsThree:
            minimum_group_size = 3
        class NeedsNone:
            minimum_group_size = 1
        class FreshOnly:
            exact_only_at_lag_zero = True
        class Silent:
            pass
        """
    )

    def config(advantage: str, anchor: str, *overrides: str) -> Config:
        return smoke(
            f"algorithm.advantage={{_target_: {module}.{advantage}}}",
            f"old_policy={{_target_: {module}.{anchor}}}",
            *overrides,
        )

    verify(config("NeedsNone", "Silent", "samples_per_prompt=1", "max_staleness=2"))
    verify(config("NeedsThree", "FreshOnly", "samples_per_prompt=3"))
    with refused("samples_per_prompt", "3 or more"):
        verify(config("NeedsThree", "FreshOnly", "samples_per_prompt=2"))
    with refused("max_staleness"):
        verify(config("NeedsThree", "FreshOnly", "max_staleness=1"))


def test_a_loss_that_needs_fresh_samples_says_so_itself(plugin: Plugin, smoke: Smoke, refused: Refused) -> None:
    module = plugin("class Fresh:\n    needs_fresh_samples = True\nclass Stale:\n    pass\n")
    fresh, stale = (f"algorithm.loss={{_target_: {module}.{name}}}" for name in ("Fresh", "Stale"))
    verify(smoke(fresh))
    verify(smoke(stale, "max_staleness=1", "learner.updates_per_step=2"))
    for loss in (fresh, "algorithm/loss=policy_gradient"):
        with refused("max_staleness = 1", "0 with this loss", "algorithm/loss=clipped"):
            verify(smoke(loss, "max_staleness=1"))
        with refused("learner.updates_per_step = 2", "1 with this loss"):
            verify(smoke(loss, "learner.updates_per_step=2"))


def test_a_loss_over_groups_needs_an_advantage_whose_sign_is_a_label(
    plugin: Plugin, smoke: Smoke, refused: Refused
) -> None:
    module = plugin("class Whole:\n    whole_groups = True\nclass Centred:\n    centred_in_group = True\n")
    own = f"algorithm.loss={{_target_: {module}.Whole}}"
    for loss in ("algorithm=real", "algorithm=real_bce", "algorithm=real_product", own):
        verify(smoke(loss, "algorithm/kl=reference", "algorithm.entropy_coefficient=0.01"))
        verify(smoke(loss, "algorithm/group_filter=mixed_scores", "learner.updates_per_step=2"))
        verify(smoke(loss, f"algorithm.advantage={{_target_: {module}.Centred}}"))
        for advantage in ("batch_normalized", "batch_normalized_group_baseline"):
            with refused("algorithm.advantage", "sign as right or wrong", "algorithm/advantage=mean_centred"):
                verify(smoke(loss, f"algorithm/advantage={advantage}"))
        with refused("algorithm.kl", "both signs", "algorithm/kl=none"):
            verify(smoke(loss, "algorithm/kl=in_reward"))


def test_a_plain_function_can_be_a_reward(plugin: Plugin, smoke: Smoke, refused: Refused) -> None:
    module = plugin("def short(sample, limit: int = 3):\n    return 1.0\n")
    reward = f"{{_target_: {module}.short, weight: 0.5, limit: 4}}"
    verify(smoke(f"reward.rewards.short={reward}"))
    with refused("'short'", "limt", "'limit'"):
        verify(smoke(f"reward.rewards.short={reward.replace('limit', 'limt')}"))


def test_relative_paths_start_where_rlkit_runs(rows: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    config, _ = load("gsm8k_smoke", [f"data.train.path={rows.name}"])
    monkeypatch.chdir(rows.parent)
    verify(config)
    (tmp_path / "else").mkdir()
    monkeypatch.chdir(tmp_path / "else")
    with pytest.raises(ConfigError, match="no such file"):
        verify(config)
