"""What training, warm start, evaluation and parity checks set up alike."""

from __future__ import annotations

import os
from collections.abc import Mapping
from datetime import timedelta

import torch
from accelerate import Accelerator, InitProcessGroupKwargs
from transformers import PreTrainedTokenizerBase

from rewards.errors import RewardError
from rewards.pool import VerifierPool
from rlkit.algorithms.base import Advantage
from rlkit.config.components import build, import_target
from rlkit.config.schema import Config, LearnerConfig, RewardConfig
from rlkit.data.prompts import PromptSet, load_prompts
from rlkit.errors import ConfigError
from rlkit.learner.update import Objective
from rlkit.rollout.scoring import reference_rollout, score_rollouts
from rlkit.types import Prompt, SamplingParams

# How long ranks wait for rank 0 (which samples, scores and evaluates alone) before they give up.
RANK_TIMEOUT = timedelta(hours=2)


def start_accelerator(config: LearnerConfig) -> Accelerator:
    """Threads, determinism, device and precision, then the process group if there is one."""
    if config.num_threads is not None:
        torch.set_num_threads(config.num_threads)
    if config.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    if config.device not in ("auto", "cpu", "cuda"):
        raise ConfigError("unknown device", key="learner.device", value=config.device,
                          expected="auto, cpu or cuda")  # fmt: skip
    if config.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("no CUDA device is visible", key="learner.device", value="cuda",
                          expected="a machine with one", fix="set learner.device=auto")  # fmt: skip
    on_gpu = config.device != "cpu" and torch.cuda.is_available()
    precision = config.mixed_precision
    if precision == "auto":
        precision = "bf16" if on_gpu and torch.cuda.is_bf16_supported() else "no"
    if precision not in ("no", "bf16"):
        raise ConfigError("unknown precision", key="learner.mixed_precision", value=precision,
                          expected="no, bf16 or auto")  # fmt: skip
    return Accelerator(
        cpu=not on_gpu, mixed_precision=precision, kwargs_handlers=[InitProcessGroupKwargs(timeout=RANK_TIMEOUT)]
    )


def build_objective(config: Config) -> Objective:
    """The algorithm's pieces that act in the learner."""
    pieces = config.algorithm
    return Objective(
        loss=build(pieces.loss, key="algorithm.loss"),
        aggregation=build(pieces.aggregation, key="algorithm.aggregation"),
        kl=build(pieces.kl, key="algorithm.kl"),
        old_policy=build(config.old_policy, key="old_policy"),
        entropy_coefficient=pieces.entropy_coefficient,
    )


def build_advantage(config: Config) -> Advantage:
    """The algorithm's advantage."""
    advantage: Advantage = build(config.algorithm.advantage, key="algorithm.advantage")
    return advantage


def open_pool(config: RewardConfig) -> VerifierPool:
    """Start the verifier processes."""
    try:
        return VerifierPool(config.rewards, workers=config.workers, timeout_s=config.timeout_s, sandbox=config.sandbox)
    except RewardError as error:
        raise ConfigError(str(error), key="reward", value=list(config.rewards)) from error


def load_prompt_sets(config: Config, tokenizer: PreTrainedTokenizerBase) -> tuple[PromptSet, dict[str, PromptSet]]:
    """Training prompts and the held-out sets; errors before anything is trained."""
    train = load_prompts(config.data.train, tokenizer, "data.train", needs_reference(config))
    held_out = {
        name: load_prompts(dataset, tokenizer, f"data.eval.{name}", needs_reference(config))
        for name, dataset in config.data.eval.items()
    }
    return train, held_out


def needs_reference(config: Config) -> bool:
    """Whether any reward compares with a reference answer: attribute `needs_reference`, default yes."""
    targets = [
        import_target(spec["_target_"], f"reward.rewards.{name}") for name, spec in config.reward.rewards.items()
    ]
    return any(getattr(target, "needs_reference", True) for target in targets)


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
    """Score the reference answers of the first prompts: a reward that cannot judge is found here.

    Raises ConfigError if a reward gives NaN for any of them, or no score for all of them.
    """
    probes = prompts[:count]
    verdicts = await score_rollouts(pool, probes, [reference_rollout(p) for p in probes])
    reasons = [v.reason or "no reason given" for v in verdicts if v.score is None]
    not_a_number = [r for r in reasons if "nan" in r.lower()]
    if not_a_number or len(reasons) == len(probes):
        raise ConfigError(
            f"the rewards give no score to {len(reasons)} of {len(probes)} reference answers: "
            f"{(not_a_number or reasons)[0]}",
            key="reward.rewards",
            value=sorted(set(reasons))[:3],
            expected="a finite number for a completion that is the reference answer",
            fix="call the reward on one row by hand, or look at its settings and the references",
        )


def message_of(left_out: Mapping[str, int], name: str, kept: int) -> str:
    """One line about the rows of a data set that were left out."""
    lost = ", ".join(f"{count} {reason}" for reason, count in left_out.items()) or "none"
    return f"{name}: {kept} prompts; left out: {lost}"
