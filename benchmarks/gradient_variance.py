"""Noise of the policy gradient by method and pass rate: tr Var[g] / |E g|^2 over resampled batches.

    python benchmarks/gradient_variance.py [--seeds 8] [--batches 400] [--out gradient_variance.json]

A tabular policy: every prompt has a softmax of its own over 16 answers, 4 of them right, with the pass rate of a
profile. A batch is the same 32 prompts with 8 fresh samples each; g is the gradient by all logits, made of rlkit's own
advantages and losses, on-policy (ratio 1, s = 0). So the figures hold the noise of sampling answers, not that of
drawing prompts, and nothing of clipping or of later updates. A seed draws other pass rates and other policies; ratios
are of the same batches, hence their smaller errors.
`cosine` is that of E g with the gradient of the expected reward, known in closed form: little variance is no virtue
where it points elsewhere. |E g|^2 is corrected for its own noise: |mean|^2 - tr Var / batches; with it a cosine
may pass 1 a little. REINFORCE's variance is known in closed form too (last row); the run fails if the estimate is not
within 6 standard errors of it.
"""

import argparse
import importlib
import json
import math
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from rlkit.algorithms.advantages.dr_grpo import MeanCentredAdvantage
from rlkit.algorithms.advantages.grpo import GroupNormalizedAdvantage
from rlkit.algorithms.advantages.rloo import LeaveOneOutAdvantage
from rlkit.algorithms.base import AdvantageInputs, GroupLoss
from rlkit.algorithms.losses.real import Real, RealBce, RealProduct

PROMPTS, SAMPLES, ANSWERS, RIGHT = 32, 8, 16, 4
Estimator = Callable[[AdvantageInputs], Tensor]  # batch -> what multiplies every sample's grad log pi, any scale


def as_advantage(loss: GroupLoss) -> Estimator:
    """-dL/ds at s = 0, which stands where an advantage would."""

    def estimator(inputs: AdvantageInputs) -> Tensor:
        scores = torch.zeros(len(inputs.scores), dtype=torch.float64, requires_grad=True)
        return -torch.autograd.grad(loss(scores, MeanCentredAdvantage()(inputs), inputs.group), scores)[0]

    return estimator


def methods() -> dict[str, Estimator]:
    """All that are compared; BNPO where this checkout has it."""
    found: dict[str, Estimator] = {
        "REINFORCE": lambda inputs: inputs.scores,
        "RLOO": LeaveOneOutAdvantage(),
        "Dr. GRPO": MeanCentredAdvantage(),
        "GRPO": GroupNormalizedAdvantage(),
        "REAL": as_advantage(Real()),
        "REAL, BCE": as_advantage(RealBce()),
        "REAL, product": as_advantage(RealProduct()),
    }
    try:
        found["BNPO"] = importlib.import_module("rlkit.algorithms.advantages.bnpo").Bnpo()
    except ModuleNotFoundError:
        print("BNPO is not in this checkout and left out")
    return found


def profiles(generator: torch.Generator) -> dict[str, Tensor]:
    """Pass rates [PROMPTS] of each kind of data set."""
    uniform = torch.rand(PROMPTS, dtype=torch.float64, generator=generator)
    # The order statistics of uniforms are Beta: the second smallest of six is Beta(2, 5).
    second = torch.rand(PROMPTS, 6, dtype=torch.float64, generator=generator).sort(dim=1).values[:, 1]
    ends = torch.tensor([0.05, 0.95], dtype=torch.float64).repeat(PROMPTS // 2)
    return {
        "all 0.5": torch.full((PROMPTS,), 0.5, dtype=torch.float64),
        "uniform": uniform,
        "Beta(2, 5), hard": second,
        "half 0.05, half 0.95": ends,
    }


def measure(
    estimators: dict[str, Estimator], rates: Tensor, batches: int, generator: torch.Generator
) -> dict[str, tuple[float, float]]:
    """Method -> (tr Var / |mean|^2, cosine of the mean with the exact gradient)."""
    noise = torch.randn(PROMPTS, ANSWERS, dtype=torch.float64, generator=generator)
    right, wrong = noise[:, :RIGHT].softmax(1) * rates[:, None], noise[:, RIGHT:].softmax(1) * (1 - rates[:, None])
    policy = torch.cat([right, wrong], dim=1)
    reward = (torch.arange(ANSWERS) < RIGHT).double()
    exact = policy * (reward - rates[:, None])  # gradient of sum_q E[R | q] by every logit
    drawn = policy.repeat(batches, 1).multinomial(SAMPLES, replacement=True, generator=generator)
    drawn = drawn.view(batches, PROMPTS, SAMPLES)
    group = torch.arange(PROMPTS).repeat_interleave(SAMPLES)
    lengths = torch.ones(len(group), dtype=torch.float64)
    found = {}
    for name, estimator in estimators.items():
        weights = [estimator(AdvantageInputs(scores=reward[a].flatten(), group=group, lengths=lengths)) for a in drawn]
        weight = torch.stack(weights).view(batches, PROMPTS, SAMPLES)
        chosen = torch.zeros(batches, PROMPTS, ANSWERS, dtype=torch.float64).scatter_add(2, drawn, weight)
        gradients = (chosen - weight.sum(2, keepdim=True) * policy).flatten(1)
        mean, variance = gradients.mean(0), float(gradients.var(0).sum())
        signal = float(mean.square().sum()) - variance / batches
        found[name] = variance / signal, float(mean @ exact.flatten() / exact.norm()) / math.sqrt(signal)
    size = 1 - 2 * policy + policy.square().sum(1, keepdim=True)  # |grad log pi(a)|^2
    spread = (policy * reward * size).sum() - exact.square().sum()
    found["REINFORCE, exact"] = float(spread / SAMPLES / exact.square().sum()), 1.0
    return found


def main() -> None:
    """Print a table and write all seeds as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=8)
    parser.add_argument("--batches", type=int, default=400)
    parser.add_argument("--out", type=Path, default=Path("gradient_variance.json"))
    options = parser.parse_args()
    estimators = methods()
    runs: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for seed in range(options.seeds):
        generator = torch.Generator().manual_seed(seed)
        for profile, rates in profiles(generator).items():
            for name, pair in measure(estimators, rates, options.batches, generator).items():
                runs.setdefault(profile, {}).setdefault(name, []).append(pair)

    def ratios(rows: dict[str, list[tuple[float, float]]], name: str) -> list[float]:
        return [a / b for (a, _), (b, _) in zip(rows[name], rows["RLOO"], strict=True)]

    table = {
        profile: {
            name: {
                "relative_variance": statistics.mean(v for v, _ in pairs),
                "relative_variance_se": statistics.stdev(v for v, _ in pairs) / math.sqrt(len(pairs)),
                "to_rloo": statistics.mean(ratios(rows, name)),
                "to_rloo_se": statistics.stdev(ratios(rows, name)) / math.sqrt(len(pairs)),
                "cosine": statistics.mean(c for _, c in pairs),
                "seeds": [v for v, _ in pairs],
            }
            for name, pairs in rows.items()
        }
        for profile, rows in runs.items()
    }
    for profile, rows in table.items():
        print(f"\npass rates: {profile}\n  {'method':18} {'tr Var / |mean|^2':>22}  {'ratio to RLOO':>17}  cosine")
        for name, row in rows.items():
            (a, b), (c, d) = [(row[key], row[f"{key}_se"]) for key in ("relative_variance", "to_rloo")]
            print(f"  {name:18} {a:12.3f} +- {b:6.3f}  {c:7.3f} +- {d:6.3f}  {row['cosine']:.3f}")
        own, closed = runs[profile]["REINFORCE"], runs[profile]["REINFORCE, exact"]
        gaps = [a - b for (a, _), (b, _) in zip(own, closed, strict=True)]
        error = statistics.stdev(gaps) / math.sqrt(len(gaps))
        assert abs(statistics.mean(gaps)) < 6 * error, "REINFORCE is off its closed form"
    options.out.write_text(json.dumps({"seeds": options.seeds, "batches": options.batches, "table": table}, indent=1))


if __name__ == "__main__":
    main()
