"""Weights against the definitions, and independence of micro-batches, order, ranks and padding."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlkit.algorithms.aggregation import (
    ConstantLength,
    PromptMean,
    SequenceMeanTokenMean,
    SequenceMeanTokenSum,
    TokenMean,
)
from rlkit.errors import ConfigError, RlkitError

ALL = [TokenMean(), SequenceMeanTokenMean(), SequenceMeanTokenSum(), ConstantLength(max_length=12)]
LENGTHS = st.lists(st.integers(0, 12), min_size=1, max_size=9)


def definition(aggregation, losses):
    """The loss as the papers write it, from the kept token losses of each non-empty sequence."""
    kept = [loss for loss in losses if len(loss)]
    sums, means = [x.sum() for x in kept], [x.mean() for x in kept]
    match aggregation:
        case TokenMean():
            return torch.cat(kept).mean()
        case SequenceMeanTokenMean():
            return torch.stack(means).mean()
        case SequenceMeanTokenSum():
            return torch.stack(sums).mean()
        case ConstantLength():
            return torch.stack(sums).mean() / aggregation.max_length


def token_losses(theta, tokens, mask):
    """A loss that is not linear in the parameters: -log softmax of masked tokens, [kept]."""
    return -torch.log_softmax(theta, 0)[tokens[mask]] * torch.tanh(theta.sum())


def make(lengths, seed):
    """Sequences of 15 tokens with `length` of them kept at random places."""
    g = torch.Generator().manual_seed(seed)
    tokens = torch.randint(7, (len(lengths), 15), generator=g)
    mask = torch.zeros(len(lengths), 15, dtype=torch.bool)
    for row, length in zip(mask, lengths, strict=True):
        row[torch.randperm(15, generator=g)[:length]] = True
    return torch.randn(7, generator=g, dtype=torch.float64), tokens, mask


@pytest.mark.parametrize("aggregation", ALL, ids=repr)
@settings(max_examples=30, deadline=None)
@given(lengths=LENGTHS, splits=st.lists(st.integers(0, 4), min_size=9, max_size=9),
       padding=st.integers(0, 3), seed=st.integers(0, 99))  # fmt: skip
def test_gradient_is_the_definitions_for_every_split(aggregation, lengths, splits, padding, seed):
    values, tokens, mask = make(lengths, seed)
    if not any(lengths):
        assert aggregation(torch.tensor(lengths)).tolist() == [0.0] * len(lengths)
        return
    theta = values.clone().requires_grad_()
    pairs = zip(tokens, mask, strict=True)
    want = definition(aggregation, [token_losses(theta, t, m) for t, m in pairs])
    want.backward()

    # Padding sequences even out micro-batches; `splits` assigns sequences to five micro-batches
    # (some empty), as accumulation on one rank or as five ranks whose gradients are summed.
    weights = aggregation(torch.cat([mask.sum(1), torch.zeros(padding, dtype=torch.int64)]))
    total, loss = torch.zeros_like(values), 0.0
    for part in range(5):
        theta_part = values.clone().requires_grad_()
        part_loss = theta_part.sum() * 0
        for i in range(len(lengths)):
            if splits[i] == part:
                summed = token_losses(theta_part, tokens[i], mask[i]).sum()
                part_loss = part_loss + weights[i] * summed
        part_loss.backward()
        total += theta_part.grad
        loss += part_loss.item()
    torch.testing.assert_close(total, theta.grad, rtol=1e-10, atol=1e-10)
    assert loss == pytest.approx(want.item(), rel=1e-10, abs=1e-10)


@given(lengths=LENGTHS, data=st.data())
@settings(max_examples=30, deadline=None)
def test_weights_follow_a_permutation_and_ignore_empty_sequences(lengths, data):
    order = data.draw(st.permutations(range(len(lengths))))
    x = torch.tensor(lengths)
    for aggregation in ALL:
        w = aggregation(x)
        torch.testing.assert_close(aggregation(x[order]), w[order], rtol=1e-15, atol=0)
        assert torch.equal(w == 0, x == 0)
        assert torch.equal(aggregation(x[x > 0]), w[x > 0])


@given(lengths=LENGTHS.filter(any))
@settings(max_examples=30, deadline=None)
def test_analytic_denominators(lengths):
    x = torch.tensor(lengths, dtype=torch.float64)
    count = sum(length > 0 for length in lengths)
    assert (TokenMean()(x) * x).sum().item() == pytest.approx(1)
    assert (SequenceMeanTokenMean()(x) * x)[x > 0].tolist() == pytest.approx([1 / count] * count)
    assert SequenceMeanTokenSum()(x).sum().item() == pytest.approx(1)
    assert ConstantLength(max_length=50)(x).sum().item() == pytest.approx(1 / 50)


def test_equal_lengths_make_token_mean_and_sequence_mean_equal():
    x = torch.full((6,), 5)
    torch.testing.assert_close(TokenMean()(x), SequenceMeanTokenMean()(x))
    torch.testing.assert_close(TokenMean()(x), ConstantLength(max_length=5)(x))


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.float32, torch.bfloat16])
def test_any_dtype_of_lengths(dtype):
    """bfloat16 cannot hold the sum 259 of these lengths; the denominator is exact anyway."""
    x = torch.tensor([256, 1, 2, 0], dtype=dtype)
    for aggregation in ALL:
        w = aggregation(x)
        assert w.dtype == torch.float64
        assert torch.equal(w, aggregation(torch.tensor([256, 1, 2, 0])))
    assert TokenMean()(x)[0].item() == 1 / 259


def test_no_sequences():
    for aggregation in ALL:
        assert aggregation(torch.zeros(0)).shape == (0,)


def test_constant_must_be_a_length():
    with pytest.raises(ConfigError, match="max_length = 0"):
        ConstantLength(max_length=0)
    assert issubclass(ConfigError, RlkitError)


@settings(max_examples=60, deadline=None)
@given(samples=st.lists(st.tuples(st.integers(0, 12), st.integers(0, 3)), min_size=1, max_size=12))
def test_prompt_mean_gives_every_prompt_the_same_whatever_its_samples(samples):
    lengths, group = (torch.tensor(x) for x in zip(*samples, strict=True))
    shares = PromptMean()(lengths, group * 7) * lengths
    alive = {g for n, g in samples if n}
    for g in range(4):
        share = float(shares[group == g].sum())
        assert share == pytest.approx(1 / len(alive) if g in alive else 0.0)
        weights = PromptMean()(lengths, group)[(group == g) & (lengths > 0)]
        assert not len(weights) or bool((weights == weights[0]).all())
    one = torch.zeros_like(group)
    torch.testing.assert_close(PromptMean()(lengths, one), TokenMean()(lengths))
