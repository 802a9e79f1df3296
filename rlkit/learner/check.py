"""`rlkit check`: the resolved configuration, what follows from it, and the memory it will need."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from omegaconf import OmegaConf
from rich.filesize import decimal

from rlkit.config.components import build
from rlkit.config.keys import datasets
from rlkit.config.schema import Config
from rlkit.errors import ConfigError
from rlkit.learner.model import empty_model

Row = tuple[str, int, str]  # name of a number, the number, where it comes from


def main(config: Config, raw: dict[str, Any]) -> int:
    """Print configuration, batch table and memory estimate, if the model is in reach; start nothing."""
    print(OmegaConf.to_yaml(OmegaConf.create(raw)))
    _print("Derived from it", batch_table(config), "{:,}".format)
    try:
        parts = estimate(config)
        parts.append(("together", sum(size for _, size, _ in parts), ""))
        _print("Memory of one learner process, estimated", parts, decimal)
    except ConfigError as error:
        if config.model.architecture is not None:
            raise
        print(f"Memory: not known: {error}\n")
    print("Nothing was started. The configuration is valid.")
    return 0


def _print(title: str, rows: Iterable[Row], shown: Callable[[int], str]) -> None:
    print(title, *(f"  {name:34}{shown(number):>14}  {how}".rstrip() for name, number, how in rows), "", sep="\n")


def batch_table(config: Config) -> list[Row]:
    """What the user-level keys come to: sequences, tokens, micro-batches, updates, queue bound."""
    groups, steps, rollout, evaluation = config.prompts_per_step, config.steps, config.rollout, config.evaluation
    sequences, updates = groups * config.samples_per_prompt, config.learner.updates_per_step
    longest = config.data.train.max_prompt_tokens + rollout.max_completion_tokens
    rows_at_once = max(1, config.learner.max_tokens_per_microbatch // longest)
    per_update = -(-groups // updates) * config.samples_per_prompt
    between = (steps - 1) // evaluation.every_steps if evaluation.every_steps else 0
    evaluations = evaluation.at_start + between + 1 if config.data.eval else 0
    return [
        ("sequences per step", sequences, "prompts_per_step * samples_per_prompt"),
        ("sampled tokens per step, at most", sequences * rollout.max_completion_tokens, "all completions full length"),
        ("trained tokens per step, at most", sequences * longest, "all prompts and completions at full length"),
        ("sequences per update", per_update, "sequences / learner.updates_per_step"),
        ("sequences per micro-batch", rows_at_once, "learner.max_tokens_per_microbatch / longest sequence"),
        ("micro-batches per step, at most", updates * -(-per_update // rows_at_once), "all at full length, one device"),
        ("optimiser steps", steps * updates, "steps * learner.updates_per_step"),
        ("completions of the run", steps * sequences, "steps * sequences"),
        ("groups in flight, at most", (config.max_staleness + 1) * groups, "(max_staleness + 1) * prompts_per_step"),
        ("evaluations", evaluations, f"of {len(config.data.eval)} held-out sets"),
    ]


def estimate(config: Config) -> list[Row]:
    """Peak memory of one learner process with the embedded engine, in bytes; allocates no weights. ConfigError.

    Activations, what a transformer block with a gated MLP and fused attention keeps for backward, are good to a factor
    of two; framework overhead is left out.
    """
    model = empty_model(config.model)
    text, count = model.config.get_text_config(), model.num_parameters()
    layers, hidden, heads = text.num_hidden_layers, text.hidden_size, text.num_attention_heads
    key_value_width = getattr(text, "num_key_value_heads", None) or heads
    key_value_width *= getattr(text, "head_dim", None) or hidden // heads
    block = 8 * hidden + 2 * key_value_width + 4 * (getattr(text, "intermediate_size", None) or 4 * hidden)
    saved = layers * hidden + block if config.model.gradient_checkpointing else layers * block
    fast = config.learner.device != "cpu" and torch.cuda.is_available()
    half = ("bfloat16", "bf16", "auto") if fast else ("bfloat16", "bf16")
    weight_bytes = 2 if config.model.dtype in half else 4
    compute_bytes = 2 if config.learner.mixed_precision in half else weight_bytes
    longest = max(d.max_prompt_tokens for d in datasets(config).values()) + config.rollout.max_completion_tokens
    sequences = config.prompts_per_step * config.samples_per_prompt
    # Never more than an update has: tiny runs stay far below the limit.
    of_update = sequences // config.learner.updates_per_step * longest
    tokens = min(max(config.learner.max_tokens_per_microbatch, longest), of_update)
    rows = max(sequences, config.evaluation.batch_samples if config.data.eval else 0)
    rows = min(rows, getattr(build(config.rollout.engine, key="rollout.engine"), "max_batch_samples", rows))
    cache, weights = 2 * layers * key_value_width * longest * rows * weight_bytes, count * weight_bytes
    part, ranks = weights, f"a rank's part of {count:,} parameters"
    if config.learner.sharded:
        part = weights // config.learner.processes
    parts = [
        ("weights", part, ranks if config.learner.sharded else f"{count:,} parameters"),
        ("gradients", part, "as the weights"),
        ("AdamW moments", 2 * part, "two, as the weights"),
        ("activations of a micro-batch", tokens * saved * compute_bytes, f"{tokens:,} tokens"),
    ]
    if not config.rollout.workers:
        parts.append(("key-value cache of the engine", cache, f"{rows:,} sequences of {longest:,} tokens"))
    if compute_bytes < weight_bytes:
        parts.append(("bfloat16 copy of the weights", 2 * count, "autocast's cache"))
    if getattr(build(config.algorithm.kl, key="algorithm.kl"), "needs_reference", False):
        parts.append(("reference model", weights, "algorithm.kl"))
    return parts
