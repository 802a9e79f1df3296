"""Checks across keys, before anything starts, and the batch arithmetic that follows from them.

A researcher sets prompts and samples per step; the rest is derived here and printed by
`rlkit check`. Checks read attributes of component classes (`minimum_group_size`,
`exact_only_at_lag_zero`, `needs_reference`), never their names.
"""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from rlkit.config.components import TARGET, build, import_target, validate
from rlkit.config.schema import Config, DatasetConfig
from rlkit.errors import ConfigError, nearest

CHOICES = {
    "resume": ("auto", "never"),
    "model.dtype": ("auto", "float32", "bfloat16"),
    "reward.sandbox": ("strict", "limits"),
    "learner.schedule": ("constant", "linear", "cosine"),
    "learner.mixed_precision": ("auto", "no", "bf16"),
    "learner.device": ("auto", "cpu", "cuda"),
    "sft.schedule": ("constant", "linear", "cosine"),
    "telemetry.wandb": ("off", "offline", "online"),
}

# (lowest, highest) value of a number; what may be fractional is given as a float.
RANGES: dict[str, tuple[float, float]] = {
    "seed": (0, 2**63 - 1),
    "steps": (1, math.inf),
    "prompts_per_step": (1, math.inf),
    "samples_per_prompt": (1, math.inf),
    "max_staleness": (0, math.inf),
    "reward.workers": (1, 1024),
    "reward.timeout_s": (0.01, math.inf),
    "reward.max_unscored_frac": (0.0, 1.0),
    "algorithm.entropy_coefficient": (-math.inf, math.inf),
    "rollout.max_completion_tokens": (1, math.inf),
    "rollout.slice_samples": (1, math.inf),
    "rollout.lease_timeout_s": (1.0, math.inf),
    "learner.learning_rate": (0.0, 1.0),
    "learner.warmup_steps": (0, math.inf),
    "learner.epsilon": (1e-30, 1.0),
    "learner.weight_decay": (0.0, math.inf),
    "learner.max_grad_norm": (0.0, math.inf),
    "learner.updates_per_step": (1, math.inf),
    "learner.max_tokens_per_microbatch": (1, math.inf),
    "learner.logprob_chunk_tokens": (1, math.inf),
    "learner.num_threads": (1, 4096),
    "checkpoint.every_steps": (1, math.inf),
    "checkpoint.keep": (1, math.inf),
    "evaluation.samples": (1, math.inf),
    "evaluation.every_steps": (0, math.inf),
    "evaluation.temperature": (0.0, math.inf),
    "evaluation.seed": (0, 2**63 - 1),
    "evaluation.batch_samples": (1, math.inf),
    "evaluation.correct_at": (-math.inf, math.inf),
    "sft.steps": (1, math.inf),
    "sft.batch_size": (1, math.inf),
    "sft.learning_rate": (0.0, 1.0),
    "sft.warmup_steps": (0, math.inf),
    "sft.weight_decay": (0.0, math.inf),
    "sft.max_grad_norm": (0.0, math.inf),
    "sft.max_completion_tokens": (1, math.inf),
    "sft.max_tokens_per_microbatch": (1, math.inf),
    "sft.seed": (0, 2**63 - 1),
    "sft.checkpoint_every_steps": (1, math.inf),
}
DATASET_RANGES: dict[str, tuple[float, float]] = {
    "max_prompt_tokens": (1, math.inf),
    "limit": (1, math.inf),
}
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+-]*")


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
        _check_names,
        _check_values,
        _check_model,
        _check_data,
        _check_rewards,
        _check_algorithm,
        _check_sampling,
        _check_lengths,
        _check_evaluation,
    ):
        yield from check(config)


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


def _problem_of(action: Callable[[], object]) -> Iterator[ConfigError]:
    try:
        action()
    except ConfigError as error:
        yield error


def _check_names(config: Config) -> Iterator[ConfigError]:
    names = {"name": config.name}
    names |= {f"data.eval.{name}": name for name in config.data.eval}
    names |= {f"reward.rewards.{name}": name for name in config.reward.rewards}
    for key, name in names.items():
        if not _NAME.fullmatch(name):
            yield ConfigError(
                "not usable as a folder's or metric's name",
                key=key,
                value=name,
                expected="letters, digits and _ . + -",
            )


def _check_values(config: Config) -> Iterator[ConfigError]:
    for key, choices in CHOICES.items():
        value = _get(config, key)
        if value is not None and value not in choices:
            yield ConfigError(
                f"unknown choice.{nearest(str(value), choices)}",
                key=key,
                value=value,
                expected=f"one of {', '.join(choices)}",
            )
    for key, limits in RANGES.items():
        yield from _in_range(key, _get(config, key), limits)
    for key, dataset in datasets(config).items():
        for name, limits in DATASET_RANGES.items():
            yield from _in_range(f"{key}.{name}", getattr(dataset, name), limits)
        if dataset.reference_pattern is not None:
            yield from _is_pattern(f"{key}.reference_pattern", dataset.reference_pattern)
    for key in ("learner.betas", "sft.betas"):
        betas = _get(config, key)
        if betas is not None and not (len(betas) == 2 and all(0 <= b < 1 for b in betas)):
            yield ConfigError(
                "not AdamW's betas", key=key, value=betas, expected="two numbers in [0, 1)"
            )


def _is_pattern(key: str, pattern: str) -> Iterator[ConfigError]:
    try:
        re.compile(pattern)
    except re.error as error:
        yield ConfigError(f"not a regular expression: {error}", key=key, value=pattern)


def _in_range(key: str, value: Any, limits: tuple[float, float]) -> Iterator[ConfigError]:
    low, high = limits
    if value is None or low <= value <= high and math.isfinite(value):
        return
    upper = "" if high == math.inf else f" and at most {high:g}"
    lower = "a finite number" if low == -math.inf else f"at least {low:g}"
    yield ConfigError("out of range", key=key, value=value, expected=f"{lower}{upper}")


def _get(config: Config, path: str) -> Any:
    value: Any = config
    for part in path.split("."):
        value = None if value is None else getattr(value, part)
    return value


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


def _check_data(config: Config) -> Iterator[ConfigError]:
    for key, component in components(config).items():
        yield from _problem_of(partial(validate, component, key))
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
        if (
            isinstance(weight, bool)
            or not isinstance(weight, int | float)
            or (not math.isfinite(weight))
        ):
            yield ConfigError(
                "not a weight", key=f"{key}.weight", value=weight, expected="a finite number"
            )
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
        validate(
            component,
            key,
            supplied=[next(iter(inspect.signature(target).parameters), "")],
            ignored=("weight",),
        )
        return
    build({name: value for name, value in component.items() if name != "weight"}, key=key)


def _check_algorithm(config: Config) -> Iterator[ConfigError]:
    for key, component in components(config).items():
        # Cheap pieces are constructed, so that they check the values of their settings.
        if key.startswith(("algorithm.", "budget", "old_policy", "rollout.", "sft.data.comp")):
            try:
                validate(component, key)
            except ConfigError:
                continue  # reported by _check_data
            yield from _problem_of(partial(build, component, key=key))
    size = _attribute(config.algorithm.advantage, "algorithm.advantage", "minimum_group_size", 1)
    if config.samples_per_prompt < size:
        yield ConfigError(
            f"{config.algorithm.advantage[TARGET]} compares the samples of a prompt",
            key="samples_per_prompt",
            value=config.samples_per_prompt,
            expected=f"{size} or more",
        )
    exact_only = _attribute(config.old_policy, "old_policy", "exact_only_at_lag_zero", False)
    if config.max_staleness > 0 and exact_only:
        yield ConfigError(
            f"{config.old_policy[TARGET]} is exact only for tokens of the current weights",
            key="max_staleness",
            value=config.max_staleness,
            expected="0 with this old_policy",
            fix="max_staleness=0, or old_policy=rollout",
        )
    if config.prompts_per_step % config.learner.updates_per_step:
        divisors = [
            n for n in range(1, config.prompts_per_step + 1) if config.prompts_per_step % n == 0
        ]
        yield ConfigError(
            "a step's groups cannot be split evenly between its updates",
            key="learner.updates_per_step",
            value=config.learner.updates_per_step,
            expected=f"a divisor of prompts_per_step={config.prompts_per_step}: "
            f"{', '.join(map(str, divisors))}",
        )


def _attribute(component: Any, key: str, name: str, default: Any) -> Any:
    """A class attribute of a component's target; the default where it has none."""
    try:
        return getattr(import_target(component[TARGET], key), name, default)
    except (ConfigError, KeyError, TypeError):
        return default  # not a component: reported by _check_data


def needs_reference(config: Config) -> bool:
    """Whether the KL penalty compares with the model training started from."""
    return bool(_attribute(config.algorithm.kl, "algorithm.kl", "needs_reference", False))


def _check_sampling(config: Config) -> Iterator[ConfigError]:
    rollout = config.rollout
    if rollout.top_p != 1.0:
        yield ConfigError(
            "truncated sampling biases the importance ratio",
            key="rollout.top_p",
            value=rollout.top_p,
            expected="1.0",
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
        completion = _get(config, completion_key)
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
        if longest > _get(config, limit_key):
            yield ConfigError(
                "the longest sequence does not fit a micro-batch",
                key=limit_key,
                value=_get(config, limit_key),
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


@dataclass(frozen=True, slots=True)
class Row:
    """A derived number and where it comes from."""

    name: str
    value: int
    how: str


def batch_table(config: Config) -> list[Row]:
    """What the user-level keys come to: sequences, tokens, micro-batches, updates, queue bound."""
    groups, samples = config.prompts_per_step, config.samples_per_prompt
    sequences = groups * samples
    updates = config.learner.updates_per_step
    longest = config.data.train.max_prompt_tokens + config.rollout.max_completion_tokens
    rows_at_once = max(1, config.learner.max_tokens_per_microbatch // longest)
    per_update = -(-groups // updates) * samples
    evaluations = 0
    if config.data.eval:
        between = 0
        if config.evaluation.every_steps:
            between = (config.steps - 1) // config.evaluation.every_steps
        evaluations = int(config.evaluation.at_start) + between + 1
    table = [
        Row("sequences per step", sequences, "prompts_per_step * samples_per_prompt"),
        Row(
            "sampled tokens per step, at most",
            sequences * config.rollout.max_completion_tokens,
            "sequences * rollout.max_completion_tokens",
        ),
        Row(
            "trained tokens per step, at most",
            sequences * longest,
            "sequences * (data.train.max_prompt_tokens + rollout.max_completion_tokens)",
        ),
        Row("sequences per update", per_update, "sequences / learner.updates_per_step"),
        Row(
            "sequences per micro-batch, at full length",
            rows_at_once,
            "learner.max_tokens_per_microbatch / longest sequence",
        ),
        Row(
            "micro-batches per step, at most",
            updates * -(-per_update // rows_at_once),
            "all sequences at full length, one device",
        ),
        Row("optimiser steps", config.steps * updates, "steps * learner.updates_per_step"),
        Row("prompts of the run", config.steps * groups, "steps * prompts_per_step"),
        Row("completions of the run", config.steps * sequences, "steps * sequences"),
        Row(
            "groups in flight, at most",
            (config.max_staleness + 1) * groups,
            "(max_staleness + 1) * prompts_per_step",
        ),
        Row(
            "age of a trained token, at most",
            config.max_staleness,
            "max_staleness, in policy versions",
        ),
        Row(
            "leases per step, at least",
            -(-sequences // config.rollout.slice_samples),
            "sequences / rollout.slice_samples",
        ),
        Row(
            "seconds of verifying per step, at most",
            math.ceil(-(-sequences // config.reward.workers) * config.reward.timeout_s),
            "every sample timing out: sequences / reward.workers * reward.timeout_s",
        ),
        Row(
            "checkpoints written, at least",
            -(-config.steps // config.checkpoint.every_steps),
            "steps / checkpoint.every_steps, and one at the end",
        ),
        Row("evaluations", evaluations, f"of {len(config.data.eval)} held-out sets"),
    ]
    if config.sft is not None:
        table.append(
            Row(
                "warm-start sequences",
                config.sft.steps * config.sft.batch_size,
                "sft.steps * sft.batch_size",
            )
        )
    return table
