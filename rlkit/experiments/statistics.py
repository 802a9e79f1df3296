"""Figures over seeds: means with errors and intervals, paired differences, probability of improvement.

Seeds are the unit of resampling. With three seeds an interval is wide and its coverage poor: it says how far
the seeds lie apart, not more.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from scipy.stats import bootstrap

from rlkit.types import FloatArray

RESAMPLES = 10_000
CONFIDENCE = 0.95


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
    mean = float(x.mean())
    if len(x) < 2:
        return Figure(value=mean, error=np.nan, low=np.nan, high=np.nan, seeds=len(x))
    found = bootstrap((x,), np.mean, n_resamples=RESAMPLES, confidence_level=CONFIDENCE, method="percentile", rng=0)
    low, high = found.confidence_interval
    return Figure(
        value=mean, error=float(x.std(ddof=1) / len(x) ** 0.5), low=float(low), high=float(high), seeds=len(x)
    )


def paired_difference(values: Mapping[int, float], baseline: Mapping[int, float]) -> Figure | None:
    """Mean over common seeds of value - baseline (same prompts and random numbers); None without a common seed."""
    common = values.keys() & baseline.keys()
    return over_seeds({seed: values[seed] - baseline[seed] for seed in sorted(common)}) if common else None


def improvement_probability(values: Mapping[int, float], baseline: Mapping[int, float]) -> Figure:
    """P(a run beats a run of the baseline) over all pairs of seeds, a tie counts half (Agarwal et al. 2021,
    arXiv 2108.13264, section 4.3: the Mann-Whitney U statistic over n m). `error` is the bootstrap's.
    """
    x, y = np.array(list(values.values())), np.array(list(baseline.values()))
    share = float(_wins(x, y))
    if len(x) < 2 or len(y) < 2:
        return Figure(value=share, error=np.nan, low=np.nan, high=np.nan, seeds=len(x))
    found = bootstrap((x, y), _wins, n_resamples=RESAMPLES, confidence_level=CONFIDENCE, method="percentile", rng=0)
    low, high = found.confidence_interval
    return Figure(value=share, error=float(found.standard_error), low=float(low), high=float(high), seeds=len(x))


def _wins(x: FloatArray, y: FloatArray, axis: int = -1) -> FloatArray:
    """Share of pairs of x [..., n] and y [..., m] that x wins, [...]; `axis` is the last one."""
    difference = x[..., :, None] - y[..., None, :]
    share: FloatArray = ((difference > 0) + 0.5 * (difference == 0)).mean(axis=(axis - 1, axis))
    return share
