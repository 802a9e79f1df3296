"""Checks of single values that a type cannot express: choices, ranges, names, patterns."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import Any

from rlkit.config.parts import datasets, get
from rlkit.config.schema import Config
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
DATASET_RANGES: dict[str, tuple[float, float]] = {"max_prompt_tokens": (1, math.inf), "limit": (1, math.inf)}
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+-]*")


def check_names(config: Config) -> Iterator[ConfigError]:
    """Names that become folders or parts of metric names."""
    names = {"name": config.name}
    names |= {f"data.eval.{name}": name for name in config.data.eval}
    names |= {f"reward.rewards.{name}": name for name in config.reward.rewards}
    for key, name in names.items():
        if not _NAME.fullmatch(name):
            yield ConfigError(
                "not usable as a folder's or metric's name", key=key, value=name, expected="letters, digits and _ . + -"
            )


def check_values(config: Config) -> Iterator[ConfigError]:
    """Every value with a choice, range or form of its own."""
    for key, choices in CHOICES.items():
        value = get(config, key)
        if value is not None and value not in choices:
            yield ConfigError(
                f"unknown choice.{nearest(str(value), choices)}",
                key=key,
                value=value,
                expected=f"one of {', '.join(choices)}",
            )
    for key, limits in RANGES.items():
        yield from _in_range(key, get(config, key), limits)
    for key, dataset in datasets(config).items():
        for name, limits in DATASET_RANGES.items():
            yield from _in_range(f"{key}.{name}", getattr(dataset, name), limits)
        if dataset.reference_pattern is not None:
            yield from _is_pattern(f"{key}.reference_pattern", dataset.reference_pattern)
    for key in ("learner.betas", "sft.betas"):
        betas = get(config, key)
        if betas is not None and not (len(betas) == 2 and all(0 <= b < 1 for b in betas)):
            yield ConfigError("not AdamW's betas", key=key, value=betas, expected="two numbers in [0, 1)")


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
