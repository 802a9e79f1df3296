"""The chunked head against `log_softmax`: values, entropies and every gradient."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rlkit.learner.logprobs import selected_logprobs


def reference(hidden, weight, targets, bias=None, temperature=1.0):
    """The definition, in the widest of the inputs' dtypes and float32."""
    dtype = torch.promote_types(torch.promote_types(hidden.dtype, weight.dtype), torch.float32)
    logits = hidden.to(dtype) @ weight.to(dtype).t()
    if bias is not None:
        logits = logits + bias.to(dtype)
    logprobs = torch.log_softmax(logits / temperature, dim=-1)
    entropy = -(logprobs.exp() * logprobs).sum(-1)
    return logprobs.gather(1, targets[:, None])[:, 0], entropy


def make(n, size, vocab, *, dtype=torch.float64, seed=0, scale=1.0):
    g = torch.Generator().manual_seed(seed)
    hidden = (torch.randn(n, size, generator=g, dtype=torch.float64) * scale).to(dtype)
    weight = torch.randn(vocab, size, generator=g, dtype=torch.float64).to(dtype)
    bias = torch.randn(vocab, generator=g, dtype=torch.float64).to(dtype)
    targets = torch.randint(vocab, (n,), generator=g)
    upstream = torch.randn(2, n, generator=g, dtype=torch.float64)
    for leaf in (hidden, weight, bias):
        leaf.requires_grad_()
    return hidden, weight, bias, targets, upstream


def close(a: Tensor, b: Tensor, tol: float = 1e-11) -> None:
    torch.testing.assert_close(a, b, rtol=tol, atol=tol)


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(0, 9), size=st.integers(1, 5), vocab=st.integers(1, 13),
    chunk_logits=st.integers(1, 150),
    temperature=st.floats(0.2, 3.0), with_bias=st.booleans(), entropy_grad=st.booleans(),
    scale=st.sampled_from([0.1, 1.0, 30.0]), seed=st.integers(0, 1000),
)  # fmt: skip
def test_values_and_gradients_equal_log_softmax(
    n, size, vocab, chunk_logits, temperature, with_bias, entropy_grad, scale, seed
):
    hidden, weight, bias, targets, up = make(n, size, vocab, seed=seed, scale=scale)
    bias = bias if with_bias else None
    lp, entropy = selected_logprobs(
        hidden, weight, targets, bias=bias, temperature=temperature, chunk_logits=chunk_logits,
        entropy_grad=entropy_grad,
    )  # fmt: skip
    lp_ref, entropy_ref = reference(hidden, weight, targets, bias, temperature)
    close(lp, lp_ref, 1e-10)
    close(entropy, entropy_ref, 1e-10)
    assert entropy.requires_grad is entropy_grad
    leaves = [t for t in (hidden, weight, bias) if t is not None]
    ours, theirs = (lp * up[0]).sum(), (lp_ref * up[0]).sum()
    if entropy_grad:
        ours, theirs = ours + (entropy * up[1]).sum(), theirs + (entropy_ref * up[1]).sum()
    got = torch.autograd.grad(ours, leaves)
    for a, b in zip(got, torch.autograd.grad(theirs, leaves), strict=True):
        close(a, b, 1e-9)


@pytest.mark.parametrize("entropy_grad", [False, True])
def test_gradcheck(entropy_grad):
    hidden, weight, bias, targets, _ = make(5, 3, 7)

    def head(h, w, b):
        lp, entropy = selected_logprobs(
            h, w, targets, bias=b, temperature=0.7, chunk_logits=15,
            entropy_grad=entropy_grad,
        )  # fmt: skip
        return (lp, entropy) if entropy_grad else lp

    assert torch.autograd.gradcheck(head, (hidden, weight, bias))


def test_entropy_alone_has_the_exact_gradient():
    hidden, weight, _, targets, up = make(6, 4, 11)
    kw = {"chunk_logits": 30, "entropy_grad": True}
    _, entropy = selected_logprobs(hidden, weight, targets, **kw)
    got = torch.autograd.grad((entropy * up[1]).sum(), (hidden, weight))
    want = torch.autograd.grad((reference(hidden, weight, targets)[1] * up[1]).sum(), (hidden, weight))
    for a, b in zip(got, want, strict=True):
        close(a, b)


def test_tied_weight_gets_the_sum_of_both_gradients():
    _, weight, _, targets, up = make(6, 4, 9)
    tokens = torch.tensor([0, 3, 3, 8, 1, 2])
    grads = []
    for head in (
        lambda h: selected_logprobs(h, weight, targets, chunk_logits=12)[0],
        lambda h: reference(h, weight, targets)[0],
    ):
        hidden = torch.tanh(torch.nn.functional.embedding(tokens, weight))
        grads.append(torch.autograd.grad((head(hidden) * up[0]).sum(), weight)[0])
    close(*grads)


@pytest.mark.parametrize("needs", list(itertools.product([False, True], repeat=3)))
def test_only_the_gradients_asked_for(needs):
    *leaves, targets, up = make(4, 3, 8)
    for leaf, need in zip(leaves, needs, strict=True):
        leaf.requires_grad_(need)
    hidden, weight, bias = leaves
    lp, _ = selected_logprobs(hidden, weight, targets, bias=bias, chunk_logits=12)
    assert lp.requires_grad is any(needs)
    if not any(needs):
        return
    (lp * up[0]).sum().backward()
    got = [leaf.grad for leaf in leaves]
    wanted = [leaf for leaf, need in zip(leaves, needs, strict=True) if need]
    loss = (reference(hidden, weight, targets, bias)[0] * up[0]).sum()
    want = iter(torch.autograd.grad(loss, wanted))
    for grad, need in zip(got, needs, strict=True):
        assert (grad is not None) is need
        if need:
            close(grad, next(want))


def test_no_grad():
    hidden, weight, _, targets, _ = make(4, 3, 8)
    with torch.no_grad():
        lp, entropy = selected_logprobs(hidden, weight, targets)
    assert not entropy.requires_grad and not lp.requires_grad
    close(lp, reference(hidden, weight, targets)[0].detach())


def test_no_tokens_still_reach_the_weights():
    """A rank whose micro-batch is empty must take part in the gradient all-reduce."""
    hidden, weight, bias, targets, _ = make(0, 3, 8)
    lp, entropy = selected_logprobs(hidden, weight, targets, bias=bias)
    assert lp.shape == entropy.shape == (0,)
    lp.sum().backward()
    assert weight.grad.count_nonzero() == bias.grad.count_nonzero() == 0
    assert hidden.grad.shape == (0, 3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_inputs_go_through_a_float32_head(dtype):
    hidden, weight, bias, targets, up = make(7, 16, 40, dtype=dtype)
    kw = {"chunk_logits": 63}
    lp, entropy = selected_logprobs(hidden, weight, targets, bias=bias, **kw)
    lp_ref, entropy_ref = reference(hidden, weight, targets, bias)
    assert lp.dtype == entropy.dtype == torch.float32
    close(lp, lp_ref, 1e-5)
    close(entropy, entropy_ref, 1e-5)
    leaves = (hidden, weight, bias)
    got = torch.autograd.grad((lp * up[0].float()).sum(), leaves)
    want = torch.autograd.grad((lp_ref * up[0].float()).sum(), leaves)
    for a, b, leaf in zip(got, want, leaves, strict=True):
        assert a.dtype == leaf.dtype
        # One rounding to the narrow dtype at the very end, on both sides.
        torch.testing.assert_close(a.float(), b.float(), rtol=2 * torch.finfo(dtype).eps, atol=1e-5)


def test_mixed_dtypes():
    hidden, weight, _, targets, _ = make(3, 4, 6, dtype=torch.float32)
    narrow = hidden.detach().bfloat16()
    lp, _ = selected_logprobs(narrow, weight, targets)
    assert lp.dtype == torch.float32
    close(lp, reference(narrow, weight, targets)[0], 1e-5)


def test_autocast_does_not_narrow_the_head():
    hidden, weight, _, targets, up = make(6, 32, 50, dtype=torch.float32)

    def run():
        lp, _ = selected_logprobs(hidden, weight, targets, chunk_logits=96)
        return [lp, *torch.autograd.grad(lp, (hidden, weight), up[0].float())]

    outside = run()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = run()
    for a, b in zip(inside, outside, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("magnitude", [1e4, -1e4])
def test_large_logits_do_not_overflow(magnitude):
    hidden, weight, bias, targets, _ = make(4, 3, 8, dtype=torch.float32)
    bias = bias.detach() + magnitude
    lp, entropy = selected_logprobs(hidden, weight, targets, bias=bias, chunk_logits=12)
    assert torch.isfinite(lp).all() and (lp <= 0).all() and (entropy >= 0).all()
    close(lp, reference(hidden, weight, targets, bias)[0], 1e-3)


@pytest.mark.parametrize("entropy_grad", [False, True])
def test_entries_masked_by_minus_infinity(entropy_grad):
    """The first slice is masked as a whole, which must not make nan."""
    hidden, weight, bias, _, up = make(4, 3, 9)
    targets = torch.tensor([4, 5, 7, 8])
    with torch.no_grad():
        bias[:4] = -torch.inf
    kw = {"chunk_logits": 12, "entropy_grad": entropy_grad}
    lp, entropy = selected_logprobs(hidden, weight, targets, bias=bias, **kw)
    kept = weight[4:], targets - 4, bias[4:]
    lp_ref, entropy_ref = reference(hidden, *kept)
    close(lp, lp_ref)
    close(entropy, entropy_ref)
    ours, theirs = (lp * up[0]).sum(), (lp_ref * up[0]).sum()
    if entropy_grad:
        ours, theirs = ours + (entropy * up[1]).sum(), theirs + (entropy_ref * up[1]).sum()
    got = torch.autograd.grad(ours, (hidden, weight))
    for a, b in zip(got, torch.autograd.grad(theirs, (hidden, weight)), strict=True):
        close(a, b)


def test_nan_is_not_hidden():
    hidden, weight, _, targets, _ = make(3, 4, 6)
    with torch.no_grad():
        hidden[1, 0] = torch.nan
    lp, entropy = selected_logprobs(hidden, weight, targets, chunk_logits=6)
    assert lp.isnan().tolist() == entropy.isnan().tolist() == [False, True, False]


def test_chunk_sizes_do_not_change_the_result():
    hidden, weight, _, targets, up = make(17, 8, 101)
    runs = []
    for logits in (1, 17 * 7, 17 * 101, 10**6):
        lp, _ = selected_logprobs(hidden, weight, targets, chunk_logits=logits)
        runs.append([lp, *torch.autograd.grad(lp, (hidden, weight), up[0])])
    for run in runs[1:]:
        for a, b in zip(run, runs[0], strict=True):
            close(a, b)


def test_saves_nothing_of_vocabulary_times_tokens():
    hidden, weight, _, targets, _ = make(64, 4, 500)
    saved = []
    hooks = torch.autograd.graph.saved_tensors_hooks
    with hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
        selected_logprobs(hidden, weight, targets)
    assert saved and max(saved) <= weight.numel() < 64 * 500


DDP = """
import sys, torch, torch.distributed as dist
from rlkit.learner.logprobs import selected_logprobs
rank, store = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method="file://" + store, rank=rank, world_size=2)

class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed = torch.nn.Embedding(11, 4)
        self.body = torch.nn.Linear(4, 4)

    def forward(self, tokens, targets):
        hidden = self.body(self.embed(tokens))
        kw = {"chunk_logits": 8}
        return selected_logprobs(hidden, self.embed.weight, targets, **kw)[0]

tokens, targets = torch.arange(6), torch.arange(6) + 5
mine = slice(0, 6) if rank == 0 else slice(0, 0)  # rank 1 has nothing to train on
model = torch.nn.parallel.DistributedDataParallel(Model().double())
model(tokens[mine], targets[mine]).sum().backward()
alone = Model().double()
alone(tokens, targets).sum().backward()
for a, b in zip(model.parameters(), alone.parameters()):
    torch.testing.assert_close(a.grad * 2, b.grad)
dist.destroy_process_group()
"""


def test_ddp_with_tied_weights_and_an_empty_rank(tmp_path):
    root = Path(__file__).resolve().parents[2]
    env = os.environ | {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", DDP, str(rank), str(tmp_path / "store")],
            env=env, stderr=subprocess.PIPE, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    try:
        errors = [process.communicate(timeout=60)[1] for process in ranks]
    finally:
        for process in ranks:
            process.kill()
            process.wait()
    assert [process.returncode for process in ranks] == [0, 0], errors
