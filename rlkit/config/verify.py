"""Checks of a whole configuration before anything starts.

They read attributes of component classes (`minimum_group_size`, `exact_only_at_lag_zero`), never
their names.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from rlkit.config.components import TARGET, build, import_target, validate
from rlkit.config.parts import attribute, components, datasets, get
from rlkit.config.schema import Config
from rlkit.config.values import check_names, check_values
from rlkit.errors import ConfigError, nearest


def verify(config: Config) -> None:
    """Raise ConfigError naming every problem of the configuration; starts and allocates nothing."""
    found = list(problems(config))
    if len(found) == 1:
        raise found[0]
    if found:
        listed = "\n".join(f"({number}) {error}" for number, error in enumerate(found, start=1))
        raise ConfigError(f"{len(found)} problems in the configuration:\n{listed}")


def problems(config: Config) -> Iterator[ConfigError]:
    """All problems, in the order of the schema."""
    for check in (
        check_names,
        check_values,
        _check_model,
        _check_components_and_data,
        _check_rewards,
        _check_algorithm,
        _check_sampling,
        _check_lengths,
        _check_evaluation,
    ):
        yield from check(config)


def _problem_of(action: Callable[[], object]) -> Iterator[ConfigError]:
    try:
        action()
    except ConfigError as error:
        yield error


def _check_model(config: Config) -> Iterator[ConfigError]:
    model = config.model
    if (model.path is None) == (model.architecture is None):
        yield ConfigError(
            "both are given" if model.path else "neither is given",
            key="model.path, model.architecture",
            value=(model.path, model.architecture),
            expected="exactly one of them",
            fix="model.path=FOLDER loads a pretrained model; model.architecture={model_type: ...} "
            "makes one; null takes one back",
        )
    if model.alphabet is not None and model.tokenizer is not None:
        yield ConfigError(
            "there is a tokenizer as well",
            key="model.alphabet",
            value=model.alphabet,
            expected="one of model.alphabet and model.tokenizer",
        )
    if model.architecture is not None:
        if "model_type" not in model.architecture:
            yield ConfigError(
                f"no model_type.{nearest('model_type', model.architecture)}",
                key="model.architecture",
                value=model.architecture,
                expected="model_type: llama (or another of transformers) and its settings",
            )
        if model.alphabet is None and model.tokenizer is None:
            yield ConfigError(
                "a model made from scratch has no tokenizer of its own",
                key="model.tokenizer",
                value=None,
                fix="set model.alphabet to the characters it should know, or model.tokenizer",
            )
    has_no_template = model.chat_template is None and model.alphabet is not None
    for key, dataset in datasets(config).items():
        if dataset.chat and has_no_template:
            yield ConfigError(
                "a character tokenizer has no chat template",
                key=f"{key}.chat",
                value=True,
                fix=f"set model.chat_template, or {key}.chat=false",
            )


def _check_components_and_data(config: Config) -> Iterator[ConfigError]:
    for key, component in components(config).items():
        # Sources are only checked: making one may look for files. The rest is cheap to construct,
        # which checks the values of its settings too.
        check = partial(validate, component, key)
        if not key.endswith(".source"):
            check = partial(build, component, key=key)
        yield from _problem_of(check)
    for key, dataset in datasets(config).items():
        if dataset.path is not None and not Path(dataset.path).expanduser().is_file():
            yield ConfigError(
                f"no such file (relative paths start at {Path.cwd()})",
                key=f"{key}.path",
                value=dataset.path,
                expected="a .jsonl, .json or .parquet file",
            )
        if dataset.system is not None and not dataset.chat:
            yield ConfigError(
                "a system message needs a chat template",
                key=f"{key}.system",
                value=dataset.system,
                fix=f"set {key}.chat=true, or put the text into {key}.prompt",
            )
    if config.sft is not None and config.sft.data.completion is None:
        yield ConfigError(
            "a warm start needs target completions",
            key="sft.data.completion",
            value=None,
            expected="a component of rlkit.data.teacher, e.g. Template",
            fix="or start from the model as it is: sft=null",
        )


def _check_rewards(config: Config) -> Iterator[ConfigError]:
    if not config.reward.rewards:
        yield ConfigError(
            "no reward",
            key="reward.rewards",
            value={},
            expected="name: {_target_: rewards.math_verify.MathVerify, weight: 1.0}",
        )
    weights = []
    for name, component in config.reward.rewards.items():
        key = f"reward.rewards.{name}"
        weight = component.get("weight", 1.0)
        weights.append(weight)
        if isinstance(weight, bool) or not isinstance(weight, int | float) or (not math.isfinite(weight)):
            yield ConfigError("not a weight", key=f"{key}.weight", value=weight, expected="a finite number")
        yield from _problem_of(partial(_construct_reward, component, key))
    if weights and all(weight == 0 for weight in weights):
        yield ConfigError(
            "every reward has weight 0: each score would be 0",
            key="reward.rewards",
            value=list(config.reward.rewards),
            fix="give at least one reward another weight",
        )


def _construct_reward(component: dict[str, Any], key: str) -> None:
    """Check a reward, and call its constructor if it is a class: that checks its settings' values."""
    target = import_target(component.get(TARGET), key) if TARGET in component else None
    if inspect.isfunction(target):
        validate(component, key, supplied=[next(iter(inspect.signature(target).parameters), "")], ignored=("weight",))
        return
    build({name: value for name, value in component.items() if name != "weight"}, key=key)


def _check_algorithm(config: Config) -> Iterator[ConfigError]:
    size = attribute(config.algorithm.advantage, "algorithm.advantage", "minimum_group_size", 1)
    if config.samples_per_prompt < size:
        yield ConfigError(
            f"{config.algorithm.advantage[TARGET]} compares the samples of a prompt",
            key="samples_per_prompt",
            value=config.samples_per_prompt,
            expected=f"{size} or more",
        )
    exact_only = attribute(config.old_policy, "old_policy", "exact_only_at_lag_zero", False)
    if config.max_staleness > 0 and exact_only:
        yield ConfigError(
            f"{config.old_policy[TARGET]} is exact only for tokens of the current weights",
            key="max_staleness",
            value=config.max_staleness,
            expected="0 with this old_policy",
            fix="max_staleness=0, or old_policy=rollout",
        )
    if config.prompts_per_step % config.learner.updates_per_step:
        divisors = [n for n in range(1, config.prompts_per_step + 1) if config.prompts_per_step % n == 0]
        yield ConfigError(
            "a step's groups cannot be split evenly between its updates",
            key="learner.updates_per_step",
            value=config.learner.updates_per_step,
            expected=f"a divisor of prompts_per_step={config.prompts_per_step}: {', '.join(map(str, divisors))}",
        )


def _check_sampling(config: Config) -> Iterator[ConfigError]:
    rollout = config.rollout
    if rollout.top_p != 1.0:
        yield ConfigError(
            "truncated sampling biases the importance ratio", key="rollout.top_p", value=rollout.top_p, expected="1.0"
        )
    if rollout.top_k != 0:
        yield ConfigError(
            "truncated sampling biases the importance ratio",
            key="rollout.top_k",
            value=rollout.top_k,
            expected="0 (off)",
        )
    if not 0 < rollout.temperature < math.inf:
        yield ConfigError(
            "training samples from the policy",
            key="rollout.temperature",
            value=rollout.temperature,
            expected="more than 0",
            fix="greedy decoding is for evaluation: evaluation.temperature=0",
        )
    if "" in rollout.stop:
        yield ConfigError("an empty stop string", key="rollout.stop", value=rollout.stop)


def _check_lengths(config: Config) -> Iterator[ConfigError]:
    window = (config.model.architecture or {}).get("max_position_embeddings")
    for key, dataset in datasets(config).items():
        warm_start = config.sft is not None and dataset is config.sft.data
        completion_key = f"{'sft' if warm_start else 'rollout'}.max_completion_tokens"
        completion = get(config, completion_key)
        longest = dataset.max_prompt_tokens + completion
        if isinstance(window, int) and longest > window:
            yield ConfigError(
                f"prompt ({dataset.max_prompt_tokens}) and completion ({completion}) tokens "
                "together do not fit the model",
                key=f"{key}.max_prompt_tokens + {completion_key}",
                value=longest,
                expected=f"at most model.architecture.max_position_embeddings={window}",
            )
        if key.startswith("data.eval."):
            continue
        limit_key = f"{'sft' if warm_start else 'learner'}.max_tokens_per_microbatch"
        if longest > get(config, limit_key):
            yield ConfigError(
                "the longest sequence does not fit a micro-batch",
                key=limit_key,
                value=get(config, limit_key),
                expected=f"at least {longest} = {key}.max_prompt_tokens + {completion_key}",
            )


def _check_evaluation(config: Config) -> Iterator[ConfigError]:
    evaluation = config.evaluation
    if evaluation.temperature == 0 and evaluation.samples != 1:
        yield ConfigError(
            "greedy decoding gives the same completion every time",
            key="evaluation.samples",
            value=evaluation.samples,
            expected="1 with evaluation.temperature=0",
        )
    if evaluation.part is not None and evaluation.part not in config.reward.rewards:
        yield ConfigError(
            f"no such reward.{nearest(evaluation.part, config.reward.rewards)}",
            key="evaluation.part",
            value=evaluation.part,
            expected=f"one of {', '.join(config.reward.rewards)}, or null for the weighted total",
        )
    if evaluation.every_steps > 0 and not config.data.eval:
        yield ConfigError(
            "there is no held-out set to evaluate on",
            key="evaluation.every_steps",
            value=evaluation.every_steps,
            fix="add data.eval.NAME, or set evaluation.every_steps=0",
        )
