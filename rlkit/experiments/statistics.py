"""Figures over seeds: means with errors and intervals, paired differences, probability of improvement.

Seeds are the unit of resampling. With three seeds an interval is wide and its coverage poor: it says how far
the seeds lie apart, not more.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from scipy.stats import bootstrap

from rlkit.types import FloatArray


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """An estimate with its standard error over seeds and its bootstrap interval; NaN where one seed says nothing."""

    value: float
    error: float
    low: float
    high: float
    seeds: int


def over_seeds(values: Mapping[int, float]) -> Figure:
    """Mean over seeds; error is sd / sqrt(n) with the unbiased sd, the interval a percentile bootstrap."""
    x = np.array(list(values.values()))
    error = float(x.std(ddof=1) / len(x) ** 0.5) if len(x) > 1 else np.nan
    return replace(_bootstrapped(np.mean, x), error=error)


def paired_difference(values: Mapping[int, float], baseline: Mapping[int, float]) -> Figure | None:
    """Mean over common seeds of value - baseline (same prompts and random numbers); None without a common seed."""
    common = values.keys() & baseline.keys()
    return over_seeds({seed: values[seed] - baseline[seed] for seed in sorted(common)}) if common else None


def improvement_probability(values: Mapping[int, float], baseline: Mapping[int, float]) -> Figure:
    """P(a run beats a run of the baseline) over all pairs of seeds, a tie counts half (Agarwal et al. 2021,
    arXiv 2108.13264, section 4.3: the Mann-Whitney U statistic over n m). `error` is the bootstrap's.
    """
    return _bootstrapped(_wins, np.array(list(values.values())), np.array(list(baseline.values())))


def _bootstrapped(statistic: Callable[..., Any], *samples: FloatArray) -> Figure:
    value, seeds = float(statistic(*samples)), len(samples[0])
    if min(map(len, samples)) < 2:
        return Figure(value=value, error=np.nan, low=np.nan, high=np.nan, seeds=seeds)
    found = bootstrap(samples, statistic, n_resamples=10_000, confidence_level=0.95, method="percentile", rng=0)
    low, high = map(float, found.confidence_interval)
    return Figure(value=value, error=float(found.standard_error), low=low, high=high, seeds=seeds)


def _wins(x: FloatArray, y: FloatArray, axis: int = -1) -> FloatArray:
    """Share of pairs of x [..., n] and y [..., m] that x wins, [...]; `axis` is the last one."""
    won: FloatArray = 0.5 + 0.5 * np.sign(x[..., :, None] - y[..., None, :])
    return won.mean(axis=(axis - 1, axis))  # type: ignore[no-any-return]
