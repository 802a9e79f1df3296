"""Checks of a whole configuration before anything starts.

They read attributes of components (`minimum_group_size`, `exact_only_at_lag_zero`, `needs_fresh_samples`), not names.
"""

import dataclasses
import functools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rewards import RewardError
from rewards import build as build_rewards
from rlkit.config.combinations import broken, pieces_of
from rlkit.config.components import TARGET, build, validate
from rlkit.config.keys import comments, datasets, sections, unwrap
from rlkit.config.schema import Component, Config
from rlkit.errors import ConfigError, nearest
from rlkit.settings import fault

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+-]{0,127}")


def verify(config: Config) -> None:
    """Raise ConfigError naming every problem of the configuration; starts and allocates nothing."""
    found = list(problems(config))
    if len(found) == 1:
        raise found[0]
    if found:
        listed = "\n".join(f"({number}) {error}" for number, error in enumerate(found, start=1))
        raise ConfigError(f"{len(found)} problems in the configuration:\n{listed}")


def problems(config: Config) -> Iterator[ConfigError]:
    """All problems: of single values, of components, then of what must go together."""
    built: dict[str, Any] = {}
    for place, section in sections(config):
        for field in dataclasses.fields(section):
            path, value = f"{place}.{field.name}".lstrip("."), getattr(section, field.name)
            doc = comments(section.__class__).get(field.name, "").removesuffix(".")
            if wrong := fault(path, value, field.metadata, f" ({doc})"):
                yield wrong
            if unwrap(field.type) == Component and value is not None and path != "model.architecture":
                # Sources are only checked: making one may look for files. The rest is cheap to construct,
                # which checks the values of its settings too.
                try:
                    built[path] = validate(value, path) if field.name == "source" else build(value, key=path)
                except ConfigError as error:
                    yield error
    try:
        if config.reward.rewards or config.reward.likelihood is None:
            build_rewards(config.reward.rewards)
        yield from (_fault(x.key, _value(config, x.key), x.reason, fix=x.fix) for x in broken(pieces_of(config, built)))
    except RewardError as error:
        yield _fault("reward.rewards", list(config.reward.rewards), str(error))
    named = {"name": [config.name], "data.eval": config.data.eval, "reward.rewards": config.reward.rewards}
    for path, name in ((path, name) for path, names in named.items() for name in names if not _NAME.fullmatch(name)):
        problem, expected = "not usable as a folder's or metric's name", "up to 128 letters, digits and _ . + -"
        yield _fault(path, name, problem, expected)
    yield from _check_model_and_data(config)
    yield from _check_algorithm(config, built)
    yield from _check_lengths(config)
    yield from _check_processes(config, built)


def _check_processes(config: Config, built: dict[str, Any]) -> Iterator[ConfigError]:
    workers, engine = config.rollout.workers, built.get("rollout.engine")
    if not workers and not getattr(engine, "in_process", True):
        problem, expected = f"{_value(config, 'rollout.engine')} is driven by worker processes", "1 or more"
        yield _fault("rollout.workers", workers, problem, expected)
    if not workers and config.learner.processes > 1:
        problem, fix = (
            "ranks of a run without workers are started by accelerate",
            "accelerate launch -m rlkit train ...",
        )
        yield _fault("learner.processes", config.learner.processes, problem, "1 with rollout.workers=0", fix)
    if config.learner.processes > 1 and getattr(engine, "takes_turns", False):
        problem, expected = "one process takes turns with the engine", "1 with rollout.engine.takes_turns"
        yield _fault("learner.processes", config.learner.processes, problem, expected)
    if config.learner.sharded and not workers:
        problem, fix = "the learner's process samples from a model of which it has a part", "rollout.workers=1"
        yield _fault("learner.sharded", True, problem, "false with rollout.workers=0", fix)
    if config.learner.sharded and config.reward.likelihood is not None:
        problem, fix = "rank 0 scores references by itself, and has a part of the model", "learner.sharded=false"
        yield _fault("learner.sharded", True, problem, "false with reward.likelihood", fix)
    evaluator = engine if config.evaluation.engine is None else built.get("evaluation.engine")
    if (
        workers
        and config.data.eval
        and config.reward.likelihood is not None
        and not getattr(evaluator, "in_process", True)
    ):
        problem, fix = "the evaluator needs the model itself to score references", "TransformersEngine"
        yield _fault("evaluation.engine", config.evaluation.engine, problem, "an engine in its process", fix)


def _value(config: Config, key: str) -> Any:
    """The component's class at `key`, or what stands there."""
    value = functools.reduce(getattr, key.split("."), config)
    return value.get(TARGET, value) if isinstance(value, dict) else value


def _fault(key: str, value: object, problem: str, expected: str | None = None, fix: str | None = None) -> ConfigError:
    return ConfigError(problem, key=key, value=value, expected=expected, fix=fix)


def _check_model_and_data(config: Config) -> Iterator[ConfigError]:
    model = config.model
    if (model.path is None) == (model.architecture is None):
        problem, given = "both are given" if model.path else "neither is given", (model.path, model.architecture)
        fix = "model.path=FOLDER loads a pretrained model; model.architecture={model_type: ...} makes one"
        yield _fault("model.path, model.architecture", given, problem, "exactly one of them, the other null", fix)
    if model.alphabet is not None and model.tokenizer is not None:
        yield _fault("model.alphabet", model.alphabet, "there is a tokenizer as well", "this or model.tokenizer")
    if model.architecture is not None and model.alphabet is None and model.tokenizer is None:
        fix = "set model.alphabet to the characters it should know, or model.tokenizer"
        yield _fault("model.tokenizer", None, "a model made from scratch has no tokenizer of its own", fix=fix)
    for key, dataset in datasets(config).items():
        if dataset.path is not None and not Path(dataset.path).expanduser().is_file():
            problem = f"no such file (relative paths start at {Path.cwd()})"
            yield _fault(f"{key}.path", dataset.path, problem, "a .jsonl, .json or .parquet file")
        if dataset.system is not None and not dataset.chat:
            fix = f"set {key}.chat=true, or put the text into {key}.prompt"
            yield _fault(f"{key}.system", dataset.system, "a system message needs a chat template", fix=fix)
    if config.sft is not None and config.sft.data.completion is None:
        expected, fix = "a component, e.g. rlkit.data.text.Template", "or start from the model as it is: sft=null"
        yield _fault("sft.data.completion", None, "a warm start needs target completions", expected, fix)
    evaluation, rewards = config.evaluation, config.reward.rewards
    if evaluation.temperature == 0 and evaluation.samples != 1:
        problem, expected = "greedy decoding gives the same completion every time", "1 with evaluation.temperature=0"
        yield _fault("evaluation.samples", evaluation.samples, problem, expected)
    if (part := evaluation.part) is not None and part not in rewards:
        expected = f"one of {', '.join(rewards)}, or null for the weighted total"
        yield _fault("evaluation.part", part, f"no such reward.{nearest(part, rewards)}", expected)
    weighted = [name for name, entry in rewards.items() if entry.get("weight", 1.0) != 0]
    if rewards and not weighted and (config.reward.likelihood is None or part is None):
        key, fix = "reward.rewards", f"give one another weight, or name one of {', '.join(rewards)} in evaluation.part"
        yield _fault(key, list(rewards), "every reward has weight 0: their total is 0", fix=fix)
    if config.reward.likelihood is not None and "likelihood" in rewards:
        yield _fault("reward.rewards", "likelihood", "this name is that of reward.likelihood", fix="choose another")
    if evaluation.every_steps > 0 and not config.data.eval:
        fix = "add data.eval.NAME, or set evaluation.every_steps=0"
        yield _fault("evaluation.every_steps", evaluation.every_steps, "there is no held-out set", fix=fix)


def _check_algorithm(config: Config, built: dict[str, Any]) -> Iterator[ConfigError]:
    pieces, updates = config.algorithm, config.learner.updates_per_step
    compares = f"{pieces.advantage[TARGET]} compares the samples of a prompt"
    advantage, rewards = built.get("algorithm.advantage"), config.reward.rewards
    size = getattr(advantage, "minimum_group_size", 1)
    for name in {*getattr(advantage, "rewards", ()), getattr(advantage, "estimate", None)} - {None, *rewards}:
        yield _fault("algorithm.advantage", name, f"no such reward.{nearest(name, rewards)}", ", ".join(rewards))
    if config.samples_per_prompt < size:
        yield _fault("samples_per_prompt", config.samples_per_prompt, compares, f"{size} or more")
    budget, samples = built.get("budget"), config.samples_per_prompt
    low, high = getattr(budget, "low", samples), getattr(budget, "high", samples)
    if not low <= samples <= high:
        key, problem = "budget.low" if low > samples else "budget.high", "a step's samples cannot be split so"
        expected = f"low <= samples_per_prompt={samples} <= high"
        yield _fault(key, low if low > samples else high, problem, expected, f"{key}={samples}")
    if low < size <= samples:
        yield _fault("budget.low", low, compares, f"{size} or more")
    if config.max_staleness > 0 and getattr(built.get("old_policy"), "exact_only_at_lag_zero", False):
        problem = f"{config.old_policy[TARGET]} is exact only for tokens of the current weights"
        yield _fault("max_staleness", config.max_staleness, problem, "0 with this old_policy", "old_policy=rollout")
    strict = [c for c in ("algorithm.loss", "reward.likelihood") if getattr(built.get(c), "needs_fresh_samples", False)]
    for key, value, fresh in (("max_staleness", config.max_staleness, 0), ("learner.updates_per_step", updates, 1)):
        if value > fresh and strict:
            problem = f"{_value(config, strict[0])} is right only for samples of the current weights"
            fix = f"{key}={fresh}, or a loss with an importance ratio: algorithm/loss=clipped"
            yield _fault(key, value, problem, f"{fresh} with this {strict[0].split('.')[1]}", fix)
    groups = config.prompts_per_step
    if updates > 0 and groups % updates:
        problem, expected = "a step's groups cannot be split evenly", f"a divisor of prompts_per_step={groups}"
        yield _fault("learner.updates_per_step", updates, problem, expected)
    for key, part in (("learner", config.learner), ("sft", config.sft)):
        if part is not None and (len(part.betas) != 2 or not all(0 <= beta < 1 for beta in part.betas)):
            yield _fault(f"{key}.betas", part.betas, "not AdamW's betas", "two numbers in [0, 1)")
    if "" in config.rollout.stop:
        yield _fault("rollout.stop", config.rollout.stop, "an empty stop string")


def _check_lengths(config: Config) -> Iterator[ConfigError]:
    window = (config.model.architecture or {}).get("max_position_embeddings")
    for key, dataset in datasets(config).items():
        completions, updates = ("sft", "sft") if key == "sft.data" else ("rollout", "learner")
        longest = dataset.max_prompt_tokens + getattr(config, completions).max_completion_tokens
        both = f"{key}.max_prompt_tokens + {completions}.max_completion_tokens"
        if isinstance(window, int) and longest > window:
            expected = f"at most model.architecture.max_position_embeddings={window}"
            yield _fault(both, longest, "prompt and completion together do not fit the model", expected)
        limit = getattr(config, updates).max_tokens_per_microbatch
        if longest > limit and not key.startswith("data.eval."):
            problem = "the longest sequence does not fit a micro-batch"
            yield _fault(f"{updates}.max_tokens_per_microbatch", limit, problem, f"at least {longest} = {both}")
