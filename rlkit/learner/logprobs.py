"""Log-probs of the sampled tokens, without a [tokens, vocabulary] tensor; z, lse and p are those of docs/logprobs.md.

Both passes walk over slices of the vocabulary, of at most `chunk_logits` logits for all tokens: the forward pass with a
running (maximum, sum) per token, of which `lse` [n] is kept; the backward pass makes each slice again:

    d logprob_i / d z_iv = [v = y_i] - p_iv,    d entropy_i / d z_iv = -p_iv (log p_iv + entropy_i).

That is cut cross-entropy (Wijmans et al., arXiv 2411.09009) without its gradient filter: exact for every upstream
gradient.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# exp() of this is exactly 0 in float32 and float64; it stands in for -inf where p * log p -> 0.
_LOG_ZERO = -1.0e4


def selected_logprobs(
    hidden: Tensor, weight: Tensor, targets: Tensor, *, bias: Tensor | None = None, temperature: float = 1.0,
    chunk_logits: int = 2**22, entropy_grad: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`log_softmax((hidden @ weight.T + bias) / temperature)` at `targets`, and its entropy.

    Args:
        hidden: [n, H] last hidden states, any floating dtype; n may be 0.
        weight, bias: [V, H] and [V] of the output head, any floating dtype.
        targets: [n] int64, in [0, V): not checked, one outside gives nonsense.
        temperature: the sampling temperature, > 0, no unit.
        chunk_logits: most logits that exist at a time (n where it is less): scratch memory of 8 bytes each, plus 8 H
            bytes for each of the slice's vocabulary entries where the weight is not float32.
        entropy_grad: let gradients flow through the entropy; otherwise it is detached.

    Returns logprobs [n] and entropy [n] in nats, float32, or float64 if an input is.
    Logits and all sums are of that dtype, autocast or not; gradients arrive in the inputs' dtypes.
    """
    with torch.autocast(hidden.device.type, enabled=False):
        inputs = hidden, weight, bias, targets, temperature, chunk_logits, entropy_grad
        return _SelectedLogprobs.apply(*inputs)  # type: ignore[no-any-return, no-untyped-call]


def _slices(
    scaled: Tensor, weight: Tensor, bias: Tensor | None, temperature: float, chunk_logits: int, buffers: int
) -> Iterator[tuple[slice, Tensor, list[Tensor]]]:
    """(vocabulary range, its weight rows [c, H] in the head's dtype, [logits [n, c], a spare tensor with 2 buffers]).

    scaled [n, H]: hidden / temperature, cheaper than scaling every slice. Valid until the next one is asked for.
    """
    (n, size), vocab = scaled.shape, len(weight)
    width = min(vocab, max(1, chunk_logits // max(1, n)))
    scratch = scaled.new_empty(buffers, n * width)
    cast = scaled.new_empty(width, size) if weight.dtype != scaled.dtype else None
    for left in range(0, vocab, width):
        columns = slice(left, min(left + width, vocab))
        rows = weight.detach()[columns]
        if cast is not None:
            rows = cast[: len(rows)].copy_(rows)
        logits, *spare = (flat[: n * len(rows)].view(n, len(rows)) for flat in scratch)  # contiguous
        if bias is None:
            torch.mm(scaled, rows.t(), out=logits)
        else:
            torch.addmm(bias.detach()[columns].to(scaled.dtype) / temperature, scaled, rows.t(), out=logits)
        yield columns, rows, [logits, *spare]


def _in_slice(targets: Tensor, columns: slice) -> tuple[Tensor, Tensor]:
    """Targets' column within a slice [n, 1] (clamped) and whether they lie in it [n, 1]; without `nonzero`'s sync."""
    column, width = (targets - columns.start).unsqueeze(1), columns.stop - columns.start
    return column.clamp(0, width - 1), (column >= 0) & (column < width)


class _SelectedLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor,
        temperature: float, chunk_logits: int, entropy_grad: bool,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        dtype = torch.promote_types(torch.promote_types(hidden.dtype, weight.dtype), torch.float32)
        scaled = hidden.to(dtype) / temperature
        # The lowest finite number, not -inf: a first slice that is all -inf must not make nan.
        peak = scaled.new_full((len(hidden), 1), torch.finfo(dtype).min)
        # sum_v exp(z - peak), sum_v exp(z - peak) (z - peak), z of the target
        total, moment, selected = torch.zeros_like(peak), torch.zeros_like(peak), torch.zeros_like(peak)
        for columns, _, (logits, spare) in _slices(scaled, weight, bias, temperature, chunk_logits, 2):
            column, inside = _in_slice(targets, columns)
            selected = torch.where(inside, logits.gather(1, column), selected)
            new_peak = torch.maximum(peak, logits.amax(1, keepdim=True))
            shift = (peak - new_peak).clamp_(min=_LOG_ZERO)
            decay = shift.exp()
            logits.sub_(new_peak)
            exponentials = torch.exp(logits.clamp_(min=_LOG_ZERO), out=spare)
            moment = (moment + shift * total) * decay + logits.mul_(exponentials).sum(1, keepdim=True)
            total = total * decay + exponentials.sum(1, keepdim=True)
            peak = new_peak
        lse = (peak + total.log()).squeeze(1)
        entropy = (total.log() - moment / total).squeeze(1)
        ctx.save_for_backward(hidden, weight, bias, targets, lse, entropy if entropy_grad else None)
        ctx.settings = temperature, chunk_logits
        if not entropy_grad:
            ctx.mark_non_differentiable(entropy)
        return selected.squeeze(1) - lse, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_logprobs: Tensor, grad_entropy: Tensor | None) -> tuple[Any, ...]:
        hidden, weight, bias, targets, lse, entropy = ctx.saved_tensors
        want_hidden, want_weight, want_bias = ctx.needs_input_grad[:3]
        temperature, chunk_logits = ctx.settings
        scaled = hidden.to(lse.dtype) / temperature
        lse, up = lse.unsqueeze(1), grad_logprobs.unsqueeze(1)
        # d / dz = row_scale * slice. Without an entropy gradient the upstream one is a factor of the whole row.
        row_scale = (-up if entropy is None else -torch.ones_like(up)) / temperature
        grad_hidden = torch.zeros_like(scaled) if want_hidden else None
        grad_weight = torch.empty_like(weight) if want_weight else None
        grad_bias = torch.empty_like(bias) if want_bias else None
        factors = hidden.to(lse.dtype) * row_scale if want_weight else None
        buffers = 1 if entropy is None else 2
        for columns, rows, (logits, *spare) in _slices(scaled, weight, bias, temperature, chunk_logits, buffers):
            column, inside = _in_slice(targets, columns)
            logits.sub_(lse)
            if entropy is None or grad_entropy is None:
                logits.exp_().scatter_add_(1, column, -inside.to(logits.dtype))
            else:
                probs = torch.exp(logits.clamp_(min=_LOG_ZERO), out=spare[0])
                logits.add_(entropy[:, None]).mul_(grad_entropy[:, None]).add_(up).mul_(probs)
                logits.scatter_add_(1, column, -up * inside)
            if grad_hidden is not None:
                grad_hidden.addmm_(logits, rows)
            if grad_weight is not None and factors is not None:
                if weight.dtype == logits.dtype:
                    torch.mm(logits.t(), factors, out=grad_weight[columns])
                else:
                    grad_weight[columns] = logits.t() @ factors
            if grad_bias is not None:
                grad_bias[columns] = logits.t() @ row_scale[:, 0]
        if grad_hidden is not None:
            grad_hidden = grad_hidden.mul_(row_scale).to(hidden.dtype)
        return grad_hidden, grad_weight, grad_bias, None, None, None, None
