"""`rlkit check`: the resolved configuration, what follows from it, and the memory it will need."""

from __future__ import annotations

import math
from typing import Any

from omegaconf import OmegaConf
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.filesize import decimal
from rich.table import Column, Table

from rlkit.config.memory import estimate
from rlkit.config.schema import Config
from rlkit.errors import ConfigError

Row = tuple[str, int, str]  # name of a number, the number, where it comes from


def main(config: Config, raw: dict[str, Any]) -> int:
    """Print configuration, batch table and memory estimate; start nothing.

    A hub model whose config is out of reach only costs the memory estimate.
    Raises ConfigError where the architecture cannot be made.
    """
    print(OmegaConf.to_yaml(OmegaConf.create(raw)))
    console = Console(width=110, markup=False, highlight=False)
    console.print(_table("Derived from it", [(name, f"{value:,}", how) for name, value, how in batch_table(config)]))
    try:
        parts = estimate(config)
    except ConfigError as error:
        if config.model.architecture is not None:
            raise
        console.print(f"Memory: not known: {error}")
    else:
        parts.append(("together", sum(size for _, size, _ in parts), ""))
        title = "Memory of one learner process, estimated"
        console.print(_table(title, [(name, decimal(size), how) for name, size, how in parts]))
    print("Nothing was started. The configuration is valid.")
    return 0


def _table(title: str, rows: list[tuple[str, str, str]]) -> Table:
    table = Table(
        "", Column(justify="right"), "", box=SIMPLE_HEAD, title=title, title_justify="left", show_header=False
    )
    for row in rows:
        table.add_row(*row)
    return table


def batch_table(config: Config) -> list[Row]:
    """What the user-level keys come to: sequences, tokens, micro-batches, updates, queue bound."""
    groups, steps, rollout, evaluation = config.prompts_per_step, config.steps, config.rollout, config.evaluation
    sequences = groups * config.samples_per_prompt
    updates = config.learner.updates_per_step
    longest = config.data.train.max_prompt_tokens + rollout.max_completion_tokens
    rows_at_once = max(1, config.learner.max_tokens_per_microbatch // longest)
    per_update = -(-groups // updates) * config.samples_per_prompt
    microbatches = updates * -(-per_update // rows_at_once)
    between = (steps - 1) // evaluation.every_steps if evaluation.every_steps else 0
    evaluations = evaluation.at_start + between + 1 if config.data.eval else 0
    verifying = math.ceil(-(-sequences // config.reward.workers) * config.reward.timeout_s)
    checkpoints = -(-steps // config.checkpoint.every_steps)
    table = [
        ("sequences per step", sequences, "prompts_per_step * samples_per_prompt"),
        ("sampled tokens per step, at most", sequences * rollout.max_completion_tokens, "all completions full length"),
        ("trained tokens per step, at most", sequences * longest, "all prompts and completions at full length"),
        ("sequences per update", per_update, "sequences / learner.updates_per_step"),
        ("sequences per micro-batch", rows_at_once, "learner.max_tokens_per_microbatch / longest sequence"),
        ("micro-batches per step, at most", microbatches, "all sequences at full length, one device"),
        ("optimiser steps", steps * updates, "steps * learner.updates_per_step"),
        ("prompts of the run", steps * groups, "steps * prompts_per_step"),
        ("completions of the run", steps * sequences, "steps * sequences"),
        ("groups in flight, at most", (config.max_staleness + 1) * groups, "(max_staleness + 1) * prompts_per_step"),
        ("age of a trained token, at most", config.max_staleness, "max_staleness, in policy versions"),
        ("leases per step, at least", -(-sequences // rollout.slice_samples), "sequences / rollout.slice_samples"),
        ("seconds of verifying per step, at most", verifying, "every sample timing out, on reward.workers"),
        ("checkpoints written, at least", checkpoints, "steps / checkpoint.every_steps, and one at the end"),
        ("evaluations", evaluations, f"of {len(config.data.eval)} held-out sets"),
    ]
    if config.sft is not None:
        table.append(("warm-start sequences", config.sft.steps * config.sft.batch_size, "sft.steps * sft.batch_size"))
    return table
