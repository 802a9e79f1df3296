from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from rlkit.data.prompts import PromptOrder

counts = st.integers(1, 60)
seeds = st.integers(0, 2**63)


@given(counts, seeds, st.integers(0, 5))
def test_every_epoch_is_a_permutation(count: int, seed: int, epoch: int) -> None:
    order = PromptOrder(count, seed)
    seen = [order.index(epoch * count + offset) for offset in range(count)]
    assert sorted(seen) == list(range(count))


@given(counts, seeds, st.lists(st.integers(0, 300), max_size=40))
def test_index_is_a_function_of_seed_and_ordinal(count: int, seed: int, asked: list[int]) -> None:
    straight = PromptOrder(count, seed)
    sequence = [straight.index(ordinal) for ordinal in range(301)]
    resumed = PromptOrder(count, seed)  # whatever was asked before, in any order
    assert [resumed.index(ordinal) for ordinal in asked] == [sequence[k] for k in asked]


def test_seeds_and_epochs_differ() -> None:
    def epoch(seed: int, number: int) -> list[int]:
        order = PromptOrder(100, seed)
        return [order.index(number * 100 + offset) for offset in range(100)]

    drawn = {tuple(epoch(seed, number)) for seed in range(5) for number in range(4)}
    assert len(drawn) == 20


def test_first_place_is_uniform_over_seeds() -> None:
    count, draws = 5, 2000
    hits = [0] * count
    for seed in range(draws):
        hits[PromptOrder(count, seed).index(0)] += 1
    expected = draws / count
    assert sum((hit - expected) ** 2 / expected for hit in hits) < 23.5  # chi2, 4 df, p = 1e-4


def test_order_is_pinned() -> None:
    """A change here breaks resuming every run made before it."""
    order = PromptOrder(6, seed=1)
    assert [order.index(k) for k in range(12)] == [2, 0, 1, 4, 5, 3, 1, 3, 5, 0, 2, 4]


@given(counts, st.integers(0, 300))
def test_without_shuffle_file_order_repeats(count: int, ordinal: int) -> None:
    assert PromptOrder(count, 7, shuffle=False).index(ordinal) == ordinal % count
