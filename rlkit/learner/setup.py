"""What training, warm start, evaluation and parity checks set up alike."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path

import torch
import transformers
from accelerate import Accelerator, InitProcessGroupKwargs
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rewards import RewardError
from rewards.pool import VerifierPool
from rlkit.config.components import build, import_target
from rlkit.config.schema import Config, LearnerConfig, ModelConfig, RewardConfig
from rlkit.data.prompts import PromptSet, load_prompts
from rlkit.errors import ConfigError
from rlkit.learner.model import load_model, resolve_dtype
from rlkit.learner.policy import Policy
from rlkit.learner.update import Learner, Objective
from rlkit.rollout.scoring import reference_rollout, score_rollouts
from rlkit.types import Prompt, SamplingParams

# How long ranks wait for rank 0 (which samples, scores and evaluates alone) before they give up.
RANK_TIMEOUT = timedelta(hours=2)


def start_accelerator(config: LearnerConfig) -> Accelerator:
    """Threads, determinism, device and precision, then the process group if there is one."""
    transformers.logging.disable_progress_bar()  # bars of a millisecond in the logs of every checkpoint
    if config.num_threads is not None:
        torch.set_num_threads(config.num_threads)
    if config.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    if config.device == "cuda" and not torch.cuda.is_available():
        fix = "set learner.device=auto"
        raise ConfigError("no CUDA device is visible", key="learner.device", value="cuda", fix=fix)
    on_gpu = config.device != "cpu" and torch.cuda.is_available()
    precision = config.mixed_precision
    if precision == "auto":
        precision = "bf16" if on_gpu and torch.cuda.is_bf16_supported() else "no"
    handlers = [InitProcessGroupKwargs(timeout=RANK_TIMEOUT)]
    return Accelerator(cpu=not on_gpu, mixed_precision=precision, kwargs_handlers=handlers)


def load_learner(
    config: Config,
    accelerator: Accelerator,
    tokenizer: PreTrainedTokenizerBase,
    source: ModelConfig,
    start: ModelConfig,
) -> tuple[PreTrainedModel, Learner]:
    """Model and learner from `source`; a reference model, where the KL needs one, from `start`."""
    dtype = resolve_dtype(config.model.dtype, accelerator.device)
    pieces = config.algorithm
    objective = Objective(
        loss=build(pieces.loss, key="algorithm.loss"),
        aggregation=build(pieces.aggregation, key="algorithm.aggregation"),
        kl=build(pieces.kl, key="algorithm.kl"),
        old_policy=build(config.old_policy, key="old_policy"),
        entropy_coefficient=pieces.entropy_coefficient,
    )

    def policy(model: PreTrainedModel) -> Policy:
        return Policy(model, temperature=config.rollout.temperature, chunk_tokens=config.learner.logprob_chunk_tokens)

    model = load_model(source, tokenizer, dtype, config.seed)
    reference = None
    if objective.kl.needs_reference:
        reference = policy(load_model(start, tokenizer, dtype, config.seed).requires_grad_(False))
        reference = reference.to(accelerator.device)
    return model, Learner(policy(model), reference, objective, config.learner, accelerator, config.steps)


def model_at(model: ModelConfig, path: Path) -> ModelConfig:
    """The same model settings, with weights and tokenizer of a checkpoint folder."""
    return dataclasses.replace(model, path=str(path), architecture=None, tokenizer=None, alphabet=None)


def open_pool(config: RewardConfig) -> VerifierPool:
    """Start the verifier processes."""
    try:
        return VerifierPool(config.rewards, workers=config.workers, timeout_s=config.timeout_s, sandbox=config.sandbox)
    except RewardError as error:
        raise ConfigError(str(error), key="reward", value=list(config.rewards)) from error


def load_prompt_sets(config: Config, tokenizer: PreTrainedTokenizerBase) -> tuple[PromptSet, dict[str, PromptSet]]:
    """Training prompts and the held-out sets. A reward may say `needs_reference = False`; default is that it does."""
    rewards = {f"reward.rewards.{name}": spec["_target_"] for name, spec in config.reward.rewards.items()}
    needed = any(getattr(import_target(path, key), "needs_reference", True) for key, path in rewards.items())
    held_out = {
        name: load_prompts(dataset, tokenizer, f"data.eval.{name}", needed)
        for name, dataset in config.data.eval.items()
    }
    return load_prompts(config.data.train, tokenizer, "data.train", needed), held_out


def sampling_params(
    tokenizer: PreTrainedTokenizerBase, config: Config, *, temperature: float, seed: int
) -> SamplingParams:
    """Sampling with the recipe's limits and stops."""
    return SamplingParams(
        temperature=temperature,
        max_tokens=config.rollout.max_completion_tokens,
        seed=seed,
        stop_token_ids=(int(tokenizer.eos_token_id),),
        stop_strings=tuple(config.rollout.stop),
    )


async def preflight(pool: VerifierPool, prompts: tuple[Prompt, ...], count: int = 8) -> None:
    """Score the reference answers of the first prompts: a reward that cannot judge is found before any training.

    Raises ConfigError if a reward gives NaN for any of them, or no score for all of them.
    """
    probes = prompts[:count]
    verdicts = await score_rollouts(pool, probes, [reference_rollout(p) for p in probes])
    reasons = [v.reason or "no reason given" for v in verdicts if v.score is None]
    not_a_number = [r for r in reasons if "nan" in r.lower()]
    if not_a_number or len(reasons) == len(probes):
        why = (not_a_number or reasons)[0]
        raise ConfigError(
            f"no score for {len(reasons)} of {len(probes)} completions that are the reference answer: {why}",
            key="reward.rewards", value=sorted(set(reasons))[:3], expected="a finite number for each",
            fix="call the reward on one row by hand, or look at its settings and the references",
        )  # fmt: skip


def message_of(left_out: Mapping[str, int], name: str, kept: int) -> str:
    """One line about the rows of a data set that were left out."""
    lost = ", ".join(f"{count} {reason}" for reason, count in left_out.items()) or "none"
    return f"{name}: {kept} prompts; left out: {lost}"
