"""The batch arithmetic: a researcher sets prompts and samples per step, the rest follows."""

from __future__ import annotations

import math
from dataclasses import dataclass

from rlkit.config.schema import Config


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
        Row("groups in flight, at most", (config.max_staleness + 1) * groups, "(max_staleness + 1) * prompts_per_step"),
        Row("age of a trained token, at most", config.max_staleness, "max_staleness, in policy versions"),
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
            Row("warm-start sequences", config.sft.steps * config.sft.batch_size, "sft.steps * sft.batch_size")
        )
    return table
