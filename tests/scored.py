"""Scores by group, as an advantage is given them."""

from __future__ import annotations

import torch

from rlkit.algorithms.base import AdvantageInputs


def inputs(groups: list[list[float]], **parts: list[float]) -> AdvantageInputs:
    """`parts` are named rewards, one value a sample in the order of the groups."""
    flat = [(score, number) for number, scores in enumerate(groups) for score in scores]
    return AdvantageInputs(
        scores=torch.tensor([s for s, _ in flat], dtype=torch.float64),
        group=torch.tensor([g for _, g in flat]),
        lengths=torch.ones(len(flat), dtype=torch.float64),
        parts={name: torch.tensor(values, dtype=torch.float64) for name, values in parts.items()},
    )
