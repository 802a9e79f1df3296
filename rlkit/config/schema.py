"""The typed schema of a recipe: every key, its type, its default and what it means.

Components (algorithm pieces, engine, budget, rewards, data sources, teachers) are open: a mapping with `_target_`, an
import path to a dataclass, whose other keys are that dataclass's fields, so a plug-in needs no entry here. The comment
beside a field is its documentation; `docs/config.md` is generated from it.
"""

from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING

from rlkit.settings import choice, number

Component = dict[str, Any]


def component(target: str) -> Any:
    """A component that has a default."""
    return field(default_factory=lambda: {"_target_": target})


@dataclass
class ModelConfig:
    """Where the policy comes from. Exactly one of `path` and `architecture` is given."""

    path: str | None = None  # Folder or hub name of a pretrained model (safetensors).
    architecture: dict[str, Any] | None = None  # transformers config of a model made from scratch, with model_type.
    tokenizer: str | None = None  # Folder or hub name of the tokenizer; default: the model's own.
    alphabet: str | None = None  # Make a character tokenizer of these characters (tiny models only).
    chat_template: str | None = None  # Jinja chat template that replaces the tokenizer's own.
    dtype: str = choice("auto", "float32", "bfloat16")  # auto: bfloat16 on devices that have it fast, else float32.
    attention: str = "sdpa"  # transformers attention implementation.
    gradient_checkpointing: bool = False  # Recompute activations backwards: less memory, a third more time.


@dataclass
class DatasetConfig:
    """One data set: where rows come from and how a row becomes a prompt."""

    source: Component = MISSING  # Component that yields rows: rlkit.data.sources.{LocalFile,HubDataset,ReasoningGym}.
    path: str | None = None  # A file (.jsonl, .json, .parquet) instead of `source`; relative to the working folder.
    prompt: str = "{question}"  # Template of the user's text, e.g. "{question}" or "{metadata[expression]}=".
    reference: str | None = "{answer}"  # Template of the reference answer; null where the reward needs none.
    reference_pattern: str | None = None  # Regular expression searched in it; its first group or match counts.
    completion: Component | None = None  # Component that writes the target completion of a row (warm start), or null.
    system: str | None = None  # System message, for chat recipes.
    chat: bool = False  # Render with the tokenizer's chat template and a generation prompt.
    max_prompt_tokens: int = number(1024, 1)  # Longer prompts are left out and counted.
    limit: int | None = number(None, 1)  # Use only the first rows.
    shuffle: bool = True  # Order rows by (seed, epoch); evaluation sets keep file order.


@dataclass
class DataConfig:
    """Training prompts and held-out sets."""

    train: DatasetConfig = field(default_factory=DatasetConfig)  # What the policy trains on.
    eval: dict[str, DatasetConfig] = field(default_factory=dict)  # Held-out sets by name; metrics are eval/<name>/...


@dataclass
class RewardConfig:
    """Verifiers: named rewards with weights, scored in killable, sandboxed subprocesses."""

    rewards: dict[str, Component] = field(default_factory=dict)  # name -> {_target_, weight, settings}; they add up.
    likelihood: Component | None = None  # Of the reference, added to the score; then `rewards` may be empty.
    workers: int = number(2, 1, 1024)  # Verifier processes.
    batch_size: int = number(32, 1)  # Most samples of one verifier child; 1 keeps samples that run code apart.
    timeout_s: float = number(5.0, 0.01)  # Wall-clock limit of a sample; past it the sample is unscored and dropped.
    sandbox: str = choice("strict", "limits")  # strict (seccomp and limits) or limits (where seccomp is not available).
    max_unscored_frac: float = number(0.5, 0, 1)  # Stop when more than this share of a step's samples is unscored.


@dataclass
class AlgorithmConfig:
    """A GRPO variant as a composition of four pieces."""

    advantage: Component = MISSING  # Scores of a step's samples -> advantages (rlkit.algorithms.advantages).
    loss: Component = MISSING  # Log-probs and advantages -> loss of each token (rlkit.algorithms.losses).
    aggregation: Component = MISSING  # Weight of a sequence's tokens in the loss (rlkit.algorithms.aggregation).
    kl: Component = component("rlkit.algorithms.kl.NoKL")  # Against the reference (rlkit.algorithms.kl).
    entropy_coefficient: float = number(0.0)  # Entropy bonus per token; 0 is off.
    group_filter: Component | None = None  # Which groups are trained on (rlkit.algorithms.group_filters).
    max_filter_draws: int = number(10, 1)  # Most groups drawn for a step, in prompts_per_step; then unfiltered.
    mask_truncated: bool = False  # Completions cut at the limit are not trained on (DAPO's overlong filter).


@dataclass
class RolloutConfig:
    """How completions are sampled."""

    engine: Component = MISSING  # rlkit.rollout.transformers_engine.TransformersEngine.
    max_completion_tokens: int = number(1024, 1)  # Longest completion; a longer one ends with finish_reason "length".
    temperature: float = number(1.0, 0.01)  # Of sampling and log-probs; greedy decoding is for evaluation only.
    top_p: float = number(1.0, 1, 1)  # Must be 1: truncated sampling biases the ratio.
    top_k: int = number(0, 0, 0)  # Must be 0 (off): truncated sampling biases the ratio.
    stop: list[str] = field(default_factory=list)  # Strings that end a completion, besides the end-of-sequence token.
    slice_samples: int = number(64, 1)  # Samples of one lease: the unit of work a worker takes from the buffer.
    lease_timeout_s: float = number(600.0, 1)  # A lease not renewed for this long is taken back.
    workers: int = number(0, 0)  # Worker processes that `rlkit train` starts; 0: the learner samples between its steps.
    verify_every: int = number(10, 0)  # Updates between two comparisons of weights; 0: only after the first update.
    verify_tolerance: float = number(1e-3, 0)  # Most that a log-prob may differ then; 16-bit weights need about 0.3.
    wait_s: float = number(1800.0, 1)  # Longest that the learner waits for workers with nothing moving in the buffer.
    snapshot_dir: str | None = None  # Where weights are left for workers; default: snapshots/ in the run folder.
    snapshot_gb: float = number(100.0, 0)  # Most that they may take together, in 1e9 bytes.


@dataclass
class BufferConfig:
    """The versioned buffer."""

    url: str | None = None  # SQLAlchemy URL; default: SQLite file buffer.db in the run folder.


@dataclass
class OptimizerConfig:
    """What training and the warm start set alike."""

    learning_rate: float = number(1e-6, 0, 1)  # Peak learning rate.
    schedule: str = choice("constant", "linear", "cosine")  # After warm-up; linear and cosine end at 0.
    warmup_steps: int = number(10, 0)  # Optimiser steps of linear warm-up.
    betas: list[float] = field(default_factory=lambda: [0.9, 0.95])  # AdamW betas.
    weight_decay: float = number(0.0, 0)  # AdamW weight decay (matrices only).
    max_grad_norm: float = number(1.0, 0)  # Gradient clipping by global norm; 0 is off.
    max_tokens_per_microbatch: int = number(16384, 1)  # Padded tokens of a forward pass (sequences bucketed by length).


@dataclass
class LearnerConfig(OptimizerConfig):
    """Optimisation."""

    epsilon: float = number(1e-8, 1e-30, 1)  # AdamW epsilon.
    updates_per_step: int = number(1, 1)  # Optimiser steps on one batch; groups are split between them whole.
    skip_zero_advantage: bool = True  # Do not compute sequences that add exactly 0 to the gradient.
    logprob_chunk_logits: int = number(2**22, 1)  # Logits that exist at a time in the log-prob head, 4 or 8 bytes each.
    mixed_precision: str = choice("auto", "no", "bf16")  # auto: bf16 where the device has it fast.
    deterministic: bool = False  # Deterministic kernels and fixed threads: bit-for-bit reproducible on one machine.
    processes: int = number(1, 1)  # Learner processes that `rlkit train` starts beside workers, one a device.
    sharded: bool = False  # Weights, gradients and moments in shards over the processes (FSDP2); needs workers.
    num_threads: int | None = number(None, 1, 4096)  # CPU threads for torch; default: torch's choice.
    device: str = choice("auto", "cpu", "cuda")  # auto: cuda where there is one.


@dataclass
class CheckpointConfig:
    """Checkpoints: the only commit point of a run."""

    every_steps: int = number(50, 1)  # Write one every so many learner steps, and always at the end or on interruption.
    keep: int = number(2, 1)  # Keep the newest so many.


@dataclass
class EvaluationConfig:
    """Held-out evaluation with standard errors."""

    samples: int = number(4, 1)  # k of avg@k, pass@k and maj@k.
    every_steps: int = number(0, 0)  # Evaluate every so many steps; 0: only before and after training.
    at_start: bool = True  # Evaluate before the first step.
    temperature: float = number(1.0, 0)  # Sampling temperature of the evaluation; 0 is greedy (then samples must be 1).
    seed: int = number(1234, 0, 2**63 - 1)  # Fixed, so that checkpoints and runs see the same draws.
    batch_samples: int = number(1024, 1)  # Samples generated and scored at a time.
    engine: Component | None = None  # Of the evaluator of a run with worker processes; default: rollout.engine.
    part: str | None = None  # Named reward to report; null: the weighted total.
    correct_at: float = number(1.0)  # A sample with at least this score counts as correct in pass@k.


@dataclass
class SftConfig(OptimizerConfig):
    """Warm start by supervised fine-tuning; loss on completions only."""

    data: DatasetConfig = field(default_factory=DatasetConfig)  # Rows with a `completion` component.
    steps: int = number(1000, 1)  # Optimiser steps.
    batch_size: int = number(64, 1)  # Sequences of a step.
    learning_rate: float = number(1e-5, 0, 1)
    schedule: str = choice("cosine", "linear", "constant")
    warmup_steps: int = number(50, 0)
    max_completion_tokens: int = number(1024, 1)  # Rows with longer completions are left out and counted.
    seed: int = number(0, 0, 2**63 - 1)  # Of weights and order: one warm start for every run seed.
    cache_dir: str = "outputs/cache"  # Finished warm starts by hash of what they depend on; later runs reuse them.
    checkpoint_every_steps: int = number(500, 1)  # An interrupted warm start goes on from here.


@dataclass
class TelemetryConfig:
    """Where metrics go. JSON lines are always written."""

    console: bool = True  # Progress bar and a line a step.
    wandb: str = choice("off", "offline", "online")  # offline needs no account.
    wandb_project: str = "rlkit"  # wandb project.
    completions_every_steps: int = number(50, 0)  # Tables of completions in wandb; 0: never. Needs save_rollouts.
    tensorboard: bool = False  # Write scalars to tensorboard/ in the run folder (extra: tensorboard).
    aliases: str = choice("none", "trl", "verl")  # Log under that library's names as well (docs/metrics.md).
    save_rollouts: bool = True  # Write every step's rollouts to rollouts/step_N.parquet.
    report: bool = True  # Write report.html at the end.


@dataclass
class Config:
    """A whole experiment."""

    name: str = "run"  # Run folder: <output_dir>/<name>.
    output_dir: str = "outputs"  # Parent of run folders.
    seed: int = number(0, 0, 2**63 - 1)  # Fixes prompt order and every sampled token.
    steps: int = number(100, 1)  # Learner steps: batches taken from the buffer.
    prompts_per_step: int = number(32, 1)  # Groups in a learner step.
    samples_per_prompt: int = number(8, 1)  # Completions per prompt, on average over a step: the budget splits them.
    max_staleness: int = number(0, 0)  # Most policy versions a token may be behind when trained on; 0: synchronous.
    resume: str = choice("auto", "never")  # auto: from the newest checkpoint; never: move an existing run aside.
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    algorithm: AlgorithmConfig = field(default_factory=AlgorithmConfig)
    budget: Component = component("rlkit.budget.uniform.UniformBudget")  # Samples of each prompt (rlkit.budget).
    old_policy: Component = component("rlkit.algorithms.old_policy.RolloutAnchor")  # Of the ratio's denominator.
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    buffer: BufferConfig = field(default_factory=BufferConfig)
    learner: LearnerConfig = field(default_factory=LearnerConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    sft: SftConfig | None = None  # Warm start, or null to start from the model as it is.
    telemetry: TelemetryConfig = field(default_factory=TelemetryConfig)
