"""Knapsack RL (arXiv 2509.25849): exact where the theory holds, bounded and whole everywhere."""

from __future__ import annotations

import itertools
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlkit.budget.knapsack import KnapsackBudget, allocate
from rlkit.budget.uniform import UniformBudget
from rlkit.errors import ConfigError

RATES = st.one_of(
    st.none(), st.sampled_from([0.0, 1.0]), st.integers(1, 15).map(lambda k: k / 16), st.floats(0, 1, allow_nan=False)
)


def value(n: int, p: float) -> float:
    """Value(N, p) of the paper."""
    return 0.0 if n == 0 else (1 - p**n - (1 - p) ** n) * p * (1 - p) ** 2


def worth(counts, rates) -> float:
    return sum(value(n, p) for n, p in zip(counts, rates, strict=True) if p is not None)


@st.composite
def problems(draw):
    rates = draw(st.lists(RATES, min_size=1, max_size=12))
    low = draw(st.integers(1, 4))
    high = draw(st.integers(low, 40))
    return rates, draw(st.integers(len(rates) * low, len(rates) * high)), low, high


def test_the_value_of_a_group():
    assert [value(n, p) for n in (1, 2, 9) for p in (0.0, 1.0)] == [0.0] * 6
    assert value(1, 0.3) == pytest.approx(0.0, abs=1e-15) and value(0, 0.3) == 0.0
    rates = np.linspace(0.001, 0.999, 999)
    assert rates[np.argmax(rates * (1 - rates) ** 2)] == pytest.approx(1 / 3, abs=1e-3)


@given(problems())
@settings(max_examples=300, deadline=None)
def test_every_allocation_sums_to_the_total_within_bounds(problem):
    rates, total, low, high = problem
    counts = allocate(*problem)
    assert sum(counts) == total
    assert all(type(n) is int and low <= n <= high for n in counts)
    assert counts == allocate(rates, total, low, high, [3.0] * len(rates))


@given(problems(), st.randoms(use_true_random=False))
@settings(max_examples=200, deadline=None)
def test_order_matters_to_ties_only(problem, shuffle):
    rates, total, low, high = problem
    order = list(range(len(rates)))
    shuffle.shuffle(order)
    before, after = allocate(*problem), allocate([rates[i] for i in order], total, low, high)
    assert worth(before, rates) == pytest.approx(worth(after, [rates[i] for i in order]), rel=1e-9, abs=1e-12)
    for place, i in enumerate(order):
        if rates[i] in (None, 0.0, 1.0):
            assert abs(after[place] - before[i]) <= 1


def test_greedy_is_the_dynamic_programme_is_brute_force():
    draw = random.Random(0)
    for case in range(1000):
        m, low = draw.randint(1, 4), draw.randint(1, 3)
        high = low + draw.randint(0, 5)
        total = draw.randint(m * low, m * high)
        rates = [draw.choice([draw.randint(1, 15) / 16, draw.uniform(0.001, 0.999)]) for _ in range(m)]
        table = [{n: value(n, p) for n in range(low, high + 1)} for p in rates]
        best = {0: 0.0}  # rollouts spent -> value, over the prompts so far
        for values in table:
            spent: dict[int, float] = {}
            for used, so_far in best.items():
                for n, v in values.items():
                    spent[used + n] = max(spent.get(used + n, -1.0), so_far + v)
            best = spent
        got = worth(allocate(rates, total, low, high), rates)
        assert got == pytest.approx(best[total], abs=1e-12), case
        splits = (x for x in itertools.product(range(low, high + 1), repeat=m) if sum(x) == total)
        assert got == pytest.approx(max(worth(x, rates) for x in splits), abs=1e-12), case


def test_greedy_takes_gains_one_by_one_with_ties_to_the_lower_index():
    """Against a plain loop, allocation by allocation."""
    draw = random.Random(1)
    for _ in range(200):
        m, low = draw.randint(1, 8), draw.randint(1, 3)
        rates = [draw.choice([0.5, 0.25, 0.125]) for _ in range(m)]  # exact in floats, ties are true ones
        total = draw.randint(m * low, m * (low + 6))
        counts = [low] * m
        for _ in range(total - m * low):
            gain = [
                p**2 * (1 - p) ** 3 * (p ** (n - 1) + (1 - p) ** (n - 1)) for n, p in zip(counts, rates, strict=True)
            ]
            room = [i for i in range(m) if counts[i] < low + 6]
            counts[max(room, key=lambda i: (gain[i], -i))] += 1
        assert allocate(rates, total, low, low + 6) == counts


@pytest.mark.parametrize(
    ("rates", "total", "want"),
    [
        ([None] * 4, 32, [8, 8, 8, 8]),  # the first epoch is uniform
        ([None] * 3, 25, [9, 8, 8]),
        ([0.0, 0.0, 1.0], 30, [14, 14, 2]),  # nothing effective: to the unsolved ones
        ([1.0, 1.0, None], 24, [6, 6, 12]),  # nor unsolved ones: in equal shares on top of the base
        ([0.5, 0.0], 40, [4, 36]),  # 4 draws of p = 0.5 are abundant: log(0.1) / log(0.5) = 3.3
        ([0.5, 0.0], 140, [12, 128]),  # what the unsolved one cannot take goes back
        ([0.5, 1.0], 40, [4, 36]),
        ([0.5, 0.5], 40, [20, 20]),  # nowhere else to go
        ([0.5, 0.0, 1.0], 384, [128, 128, 128]),
        ([0.5, 0.0, None], 300, [72, 128, 100]),
        ([0.0, 0.01], 100, [2, 98]),  # a rare success takes 230 draws: not abundant
    ],
)
def test_fallbacks(rates, total, want):
    assert allocate(rates, total) == want


def test_prompts_of_middling_difficulty_come_first():
    by_rate = dict(zip([0.05, 1 / 3, 0.6, 0.97], allocate([0.05, 1 / 3, 0.6, 0.97], 24), strict=True))
    assert max(by_rate, key=by_rate.get) == 1 / 3
    assert by_rate[0.97] == 2


def test_costs_prefer_the_cheaper_of_equals():
    free = allocate([0.3, 0.3], 16)
    assert free == [8, 8]
    dear, cheap = allocate([0.3, 0.3], 16, costs=[1000.0, 100.0])
    assert dear < 8 < cheap and dear + cheap == 16


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (([0.5] * 4, 7), "total=7"),
        (([0.5] * 4, 4 * 128 + 1), "total=513"),
        (([0.5], 4, 5, 3), "total=4"),
        (([], 0), "total=0"),
        (([0.5], 4, 0), "low=0"),
        (([0.5, float("nan")], 8), r"pass_rates\[1\]=nan"),
        (([1.1], 8), r"pass_rates\[0\]=1.1"),
        (([-0.1], 8), r"pass_rates\[0\]"),
        (([0.5], 8, 2, 128, [0.0]), "costs"),
        (([0.5], 8, 2, 128, [1.0, 1.0]), "costs"),
        (([0.5], 8, 2, 128, [float("nan")]), "costs"),
    ],
)
def test_what_cannot_be_is_refused(arguments, match):
    with pytest.raises(ValueError, match=match) as raised:
        allocate(*arguments)
    assert "expected" in str(raised.value)


def groups(*scores: list[float], tokens: int = 10) -> list[list[tuple[float, int]]]:
    return [[(score, tokens) for score in group] for group in scores]


def test_the_rate_is_of_the_latest_group_or_the_latest_window():
    """methods: the latest epoch's mean; with fewer than 16 rewards that of the latest 16."""
    asked = []

    def rate_seen(found, **fields):
        def history(latest):
            asked.append(latest)
            return {"a": found, "b": groups([1.0] * 8)}

        budget = KnapsackBudget(**fields)
        return budget(["a", "b"], 40, history)[0]

    def expected(rate):
        return allocate([rate, 1.0], 40)[0]

    half = [0.0] * 10 + [1.0] * 10
    assert rate_seen(groups(half, [0.0] * 8)) == expected(0.5)  # 20 >= 16: the older group does not count
    assert rate_seen(groups([1.0] * 8, [0.0] * 8, [1.0] * 8)) == expected(0.5)  # 16 of the newest two
    assert rate_seen(groups([1.0] * 8, [1.0] * 4 + [0.0] * 8, [1.0] * 4)) == expected(0.5)  # its last 8
    assert rate_seen(groups([1.0] * 4, [0.0] * 3)) == expected(None)  # 7 < 8
    assert rate_seen(groups([1.0] * 4, [0.0] * 3), minimum=7) == expected(4 / 7)
    assert rate_seen(groups([0.6] * 4 + [0.4] * 4), correct_at=0.5) == expected(0.5)
    assert rate_seen(groups([0.7 + 0.2 + 0.1] * 4 + [0.2] * 4)) == expected(0.5)  # weighted sums round
    assert rate_seen(groups([])) == expected(None)
    assert set(asked) == {16}


def test_costs_are_the_prompts_mean_lengths():
    mixed = [1.0] + [0.0] * 15
    past = {"long": groups(mixed, tokens=900), "short": groups(mixed, tokens=30)}
    even = KnapsackBudget()(["long", "short", "new"], 24, lambda latest: past)
    assert even == [8, 8, 8]
    long, short, new = KnapsackBudget(cost_by_length=True)(["long", "short", "new"], 24, lambda latest: past)
    assert long < short and long + short + new == 24


def test_a_prompt_may_be_named_twice():
    past = {"a": groups([1.0] * 4 + [0.0] * 4)}
    assert sum(KnapsackBudget()(["a", "b", "a"], 24, lambda latest: past)) == 24


def test_settings_out_of_range_are_refused():
    with pytest.raises(ConfigError, match="low"):
        KnapsackBudget(low=0)
    with pytest.raises(ConfigError, match="minimum"):
        KnapsackBudget(minimum=17)


def test_the_uniform_budget_asks_no_history():
    def history(latest):
        raise AssertionError

    assert UniformBudget()(["a", "b"], 16, history) == [8, 8]
