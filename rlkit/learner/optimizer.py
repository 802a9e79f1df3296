"""AdamW with decay on matrices only, and learning-rate schedules as a pure function of the step."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import nn

SCHEDULES = ("constant", "linear", "cosine")


def learning_rate_factor(step: int, *, schedule: str, warmup_steps: int, total_steps: int) -> float:
    """Share of the peak learning rate at optimiser step `step` (0-based).

    Warm-up rises linearly to 1 over `warmup_steps`; then constant, or linear or half-cosine down to 0
    at `total_steps`.

    Example: warmup_steps=2, total_steps=4, linear: 0.5, 1.0, 1.0, 0.5.
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    if schedule == "constant":
        return 1.0
    progress = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
    if schedule == "linear":
        return 1.0 - progress
    if schedule == "cosine":
        return 0.5 * (1.0 + math.cos(math.pi * progress))
    raise ValueError(f"schedule={schedule!r}: expected one of {SCHEDULES}")


def make_optimizer(
    model: nn.Module, *, learning_rate: float, betas: Sequence[float], epsilon: float, weight_decay: float
) -> torch.optim.AdamW:
    """AdamW over the trainable parameters; norms, biases and other vectors are not decayed."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trainable if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in trainable if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [g for g in groups if g["params"]], lr=learning_rate, betas=(betas[0], betas[1]), eps=epsilon, fused=True
    )


def set_learning_rate(optimizer: torch.optim.Optimizer, value: float) -> None:
    """Set the learning rate of every parameter group."""
    for group in optimizer.param_groups:
        group["lr"] = value
