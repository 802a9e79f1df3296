"""Knapsack RL: rollouts go where they are likely to make a gradient (arXiv 2509.25849, code liziniu/KnapsackRL).

    maximise  sum_i Value(N_i, p_i)   subject to   sum_i N_i = total,   low <= N_i <= high
    Value(N, p) = (1 - p^N - q^N) p q^2,   q = 1 - p,   Value(0, p) = 0

Greedy is exact: the gain of one more rollout is Value(N + 1) - Value(N) = p^2 q^3 (p^(N-1) + q^(N-1)), which does not
grow with N >= 1, and a sum of functions concave in N_i is maximal where the largest gains are taken. At N = 0 concavity
ends, hence low >= 1.
"""

from bisect import bisect_right
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from rlkit.budget.uniform import History
from rlkit.errors import ConfigError
from rlkit.settings import Checked, number
from rlkit.types import IntArray

Rates = NDArray[np.float64]
CONFIDENCE = 0.9  # of the reference code's estimate of the rollouts a prompt needs


def allocate(
    pass_rates: Sequence[float | None], total: int, low: int = 2, high: int = 128, costs: Sequence[float] | None = None
) -> list[int]:
    """Rollouts of every prompt: `low` to `high` each, `total` in all; a pass rate of None has no history.

    Prompts without history get the uniform share, total // M, all others `low`. What is left goes to the effective ones
    (0 < p < 1) by greedy gains, ties to the lower index: exact where all are effective. Beyond the paper's objective,
    as in its code, they have enough with sum_i ceil(log(0.1) / log(max(p_i, q_i))) rollouts (each term within
    [low, high]), about what a mixed group takes at confidence 0.9. The rest goes to the unsolved prompts (p = 0) in
    equal shares; where there are none, to the solved and the new ones; where all are effective, to them by greedy. What
    exceeds `high` there goes to the effective prompts, then to all others in equal shares.

    `costs`: expected tokens of a rollout of each prompt. Greedy then takes the largest gain / cost, an approximation:
    the constraint still counts rollouts. M x (high - low) floats are held.

    ValueError: no such allocation, a rate outside [0, 1], a cost that is not > 0.
    """
    count = len(pass_rates)
    if low < 1:
        raise ValueError(f"low={low}: expected 1 or more")
    if count == 0 or not count * low <= total <= count * high:
        raise ValueError(f"total={total}: expected from {count} prompts * low={low} to {count} prompts * high={high}")
    for index, rate in enumerate(pass_rates):
        if rate is not None and not 0 <= rate <= 1:
            raise ValueError(f"pass_rates[{index}]={rate}: expected 0 to 1, or None without history")
    price = np.ones(count) if costs is None else np.array(costs, dtype=np.float64)
    if price.shape != (count,) or not (np.isfinite(price) & (price > 0)).all():
        raise ValueError(f"costs={costs}: expected {count} finite numbers > 0, one a prompt")

    p = np.array([np.nan if rate is None else rate for rate in pass_rates])
    effective, unsolved = (p > 0) & (p < 1), p == 0
    others = unsolved if unsolved.any() else ~effective
    n = np.where(np.isnan(p), total // count, low)
    rarer = np.minimum(p, 1 - p)[effective]
    with np.errstate(over="ignore"):
        needed = np.clip(np.ceil(np.log(1 - CONFIDENCE) / np.log1p(-rarer)), low, high).astype(np.int64) - low
    left = total - int(n.sum())
    excess = min(max(0, left - int(needed.sum())), int((high - n[others]).sum()))
    n[others] += _evenly(high - n[others], excess)
    n[effective] += _greedy(p[effective], price[effective], left - excess, low, high)
    n += _evenly(high - n, total - int(n.sum()))
    return [int(x) for x in n]


def _greedy(p: Rates, cost: Rates, amount: int, low: int, high: int) -> IntArray:
    """How many of the `amount` largest gains over all prompts and N = low .. high - 1 are of each prompt, [M]."""
    step, column = np.arange(high - low), p[:, None]
    # x^(N-1) by products: they do not grow with N, rounded or not.
    one, other = (np.cumprod(np.where(step, x, x ** (low - 1)), axis=1) for x in (column, 1 - column))
    gains = (one + other) * (p**2 * (1 - p) ** 3 / cost)[:, None]
    amount = min(amount, gains.size)
    if amount == 0:
        return np.zeros(len(p), dtype=np.int64)
    smallest = np.partition(gains, gains.size - amount, axis=None)[gains.size - amount]
    taken, tied = (gains > smallest).sum(axis=1), (gains == smallest).sum(axis=1)
    more: IntArray = taken + np.clip(amount - taken.sum() - (tied.cumsum() - tied), 0, tied)  # ties: lower index first
    return more


def _evenly(room: IntArray, amount: int) -> IntArray:
    """Equal shares of `amount` <= sum(room), each within its room [M]; the first ones get one more."""
    levels = range(int(room.max(initial=0)) + 1)
    level = bisect_right(levels, amount, key=lambda n: int(np.minimum(room, n).sum())) - 1
    share: IntArray = np.minimum(room, level)
    share[np.flatnonzero(room > level)[: amount - int(share.sum())]] += 1
    return share


class KnapsackBudget(Checked, kw_only=True):
    """`allocate` at pass rates measured on each prompt's own earlier rollouts.

    The rate is that of the prompt's latest group, or of its latest `window` scored samples if the group has fewer. With
    less than `minimum` of them the prompt has no history: the first epoch is uniform.
    """

    needs_verdicts = True
    low: int = number(2, 1)
    high: int = number(128, 1, 4096)
    window: int = number(16, 1)
    minimum: int = number(8, 1)
    correct_at: float = number(1.0)  # a sample with at least this score, the rewards' weighted sum, counts as correct
    cost_by_length: bool = False  # gain per expected token, see `allocate`

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.minimum > self.window:
            raise ConfigError("too large", key="minimum", value=self.minimum, expected=f"at most window={self.window}")

    def __call__(self, prompt_ids: Sequence[str], total: int, history: History) -> list[int]:
        """See `allocate`."""
        latest = {
            name: [sample for group in groups for sample in reversed(group)][: max(self.window, len(groups[0]))]
            for name, groups in history(self.window).items()
        }
        samples = [latest.get(name, []) for name in prompt_ids]
        least = self.correct_at - 1e-9  # 0.7 + 0.2 + 0.1 is below 1 in floats
        rates = [sum(s >= least for s, _ in x) / len(x) if len(x) >= self.minimum else None for x in samples]
        costs = [sum(tokens for _, tokens in x) / len(x) if x else 1.0 for x in samples]
        return allocate(rates, total, self.low, self.high, costs if self.cost_by_length else None)
