"""Log-probs of the sampled tokens, without a [tokens, vocabulary] tensor.

With z_iv = (h_i . w_v + b_v) / T the head returns

    logprob_i = z_{i, y_i} - lse_i,     lse_i = log sum_v exp z_iv,
    entropy_i = lse_i - sum_v p_iv z_iv,    p_iv = exp(z_iv - lse_i).

The forward pass walks over tiles of at most `chunk_tokens` x `chunk_vocab` logits with a running (maximum, sum) per
token and keeps `lse` [n] alone; the backward pass makes each tile again and multiplies it into both gradients at once:

    d logprob_i / d z_iv = [v = y_i] - p_iv,    d entropy_i / d z_iv = -p_iv (log p_iv + entropy_i).

Blockwise log-sum-exp and recomputing backward pass are those of cut cross-entropy (Wijmans et al., arXiv 2411.09009),
without its gradient filter: exact for every upstream gradient. The vocabulary is the outer loop: a pass reads each
slice of the weight once and writes its gradient once; only the [n, H] gradient of the hidden states is accumulated.
"""

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from rlkit.errors import ConfigError, TrainingError

# exp() of this is exactly 0 in float32 and float64; it stands in for -inf where p * log p -> 0.
_LOG_ZERO = -1.0e4


def selected_logprobs(
    hidden: Tensor, weight: Tensor, targets: Tensor, *, bias: Tensor | None = None, temperature: float = 1.0,
    chunk_tokens: int = 1024, chunk_vocab: int = 4096, with_entropy: bool = True, entropy_grad: bool = False,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """`log_softmax((hidden @ weight.T + bias) / temperature)` at `targets`, and its entropy.

    Args:
        hidden: [n, H] last hidden states, any floating dtype; n may be 0.
        weight: [V, H] the output head (tied embeddings are fine), any floating dtype.
        targets: [n] int64, in [0, V).
        bias: [V] or None.
        temperature: the sampling temperature, > 0, no unit.
        chunk_tokens, chunk_vocab: most tokens and vocabulary entries whose logits exist at a time: scratch memory
            of chunk_tokens * chunk_vocab * 4 bytes (twice that with entropy), plus chunk_vocab * H * 8 bytes where
            the weight is not float32.
        entropy_grad: let gradients flow through the entropy; otherwise it is detached.

    Returns logprobs [n] and entropy [n] in nats (None unless `with_entropy`), float32, or float64 if an input is.
    Logits and all sums are of that dtype, autocast or not; gradients arrive in the inputs' dtypes.

    Raises ConfigError: temperature or chunk size out of range, or `entropy_grad` without `with_entropy`;
    TrainingError: shapes or dtypes that do not fit, or a target outside [0, V).
    """
    tiling = temperature, chunk_tokens, chunk_vocab
    if not 0 < temperature < math.inf or min(chunk_tokens, chunk_vocab) < 1 or (entropy_grad and not with_entropy):
        key, expected = (
            "temperature, chunk_tokens, chunk_vocab",
            "finite > 0, >= 1, >= 1; entropy_grad with_entropy only",
        )
        raise ConfigError("out of range", key=key, value=tiling, expected=expected)
    _check_tensors(hidden, weight, targets, bias)
    with torch.autocast(hidden.device.type, enabled=False):
        inputs = hidden, weight, bias, targets, tiling, with_entropy, entropy_grad
        return _SelectedLogprobs.apply(*inputs)  # type: ignore[no-any-return, no-untyped-call]


class _Tiles:
    """[tokens, vocabulary] tiles of logits, one at a time, in one scratch buffer (`spare`: and a second tile)."""

    def __init__(
        self, hidden: Tensor, weight: Tensor, bias: Tensor | None, tiling: tuple[float, int, int], spare: bool
    ) -> None:
        temperature, chunk_tokens, chunk_vocab = tiling
        self.dtype = torch.promote_types(torch.promote_types(hidden.dtype, weight.dtype), torch.float32)
        self.tokens, self.vocab = hidden.shape[0], weight.shape[0]
        self.chunk_tokens = max(1, min(chunk_tokens, self.tokens))
        self.chunk_vocab = min(chunk_vocab, self.vocab)
        # Scaling [n, H] once is cheaper than scaling every tile.
        self.hidden = hidden.detach().to(self.dtype)
        if temperature != 1.0:
            self.hidden = self.hidden / temperature
        self.weight = weight.detach()
        self.bias = None if bias is None else bias.detach().to(self.dtype) / temperature
        self.narrower = weight.dtype != self.dtype
        self.buffers = self.new(1 + spare, self.chunk_tokens * self.chunk_vocab)

    def new(self, *shape: int) -> Tensor:
        """An uninitialised tensor of the head's dtype on its device."""
        return torch.empty(shape, dtype=self.dtype, device=self.hidden.device)

    def __iter__(self) -> Iterator[tuple[slice, slice, Tensor, list[Tensor]]]:
        """Slice of the vocabulary by slice, and in each chunk of the tokens by chunk:

        (token range, vocabulary range, weight rows [c, H] in the head's dtype, [logits [r, c] and the spare tile]),
        valid until the next one is asked for.
        """
        cast = self.new(self.chunk_vocab, self.weight.shape[1]) if self.narrower else None
        for left in range(0, self.vocab, self.chunk_vocab):
            columns = slice(left, min(left + self.chunk_vocab, self.vocab))
            weight_rows = self.weight[columns]
            if cast is not None:
                weight_rows = cast[: len(weight_rows)].copy_(weight_rows)
            for top in range(0, self.tokens, self.chunk_tokens):
                rows = slice(top, min(top + self.chunk_tokens, self.tokens))
                shape = rows.stop - top, columns.stop - left
                logits, *spare = (flat[: shape[0] * shape[1]].view(shape) for flat in self.buffers)  # contiguous
                if self.bias is None:
                    torch.mm(self.hidden[rows], weight_rows.t(), out=logits)
                else:
                    torch.addmm(self.bias[columns], self.hidden[rows], weight_rows.t(), out=logits)
                yield rows, columns, weight_rows, [logits, *spare]


def _in_tile(targets: Tensor, columns: slice) -> tuple[Tensor, Tensor]:
    """Targets' column within a tile [r, 1] (clamped) and whether they lie in it [r, 1]; without `nonzero`'s sync."""
    column = (targets - columns.start).unsqueeze(1)
    width = columns.stop - columns.start
    return column.clamp(0, width - 1), (column >= 0) & (column < width)


class _SelectedLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor,
        tiling: tuple[float, int, int], with_entropy: bool, entropy_grad: bool,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        tiles = _Tiles(hidden, weight, bias, tiling, spare=with_entropy)
        n = tiles.tokens
        # The lowest finite number, not -inf: a first slice that is all -inf must not make nan.
        peak = tiles.new(n, 1).fill_(torch.finfo(tiles.dtype).min)
        total = tiles.new(n, 1).zero_()  # sum_v exp(z - peak)
        moment = tiles.new(n, 1).zero_()  # sum_v exp(z - peak) (z - peak)
        selected = tiles.new(n, 1).zero_()
        for rows, columns, _, (logits, *spare) in tiles:
            column, inside = _in_tile(targets[rows], columns)
            selected[rows] = torch.where(inside, logits.gather(1, column), selected[rows])
            new_peak = torch.maximum(peak[rows], logits.amax(1, keepdim=True))
            shift = (peak[rows] - new_peak).clamp_(min=_LOG_ZERO)
            decay = shift.exp()
            logits.sub_(new_peak)
            if not with_entropy:
                exponentials = logits.exp_()
            else:
                exponentials = torch.exp(logits.clamp_(min=_LOG_ZERO), out=spare[0])
                moment[rows] = (moment[rows] + shift * total[rows]) * decay
                moment[rows] += logits.mul_(exponentials).sum(1, keepdim=True)
            total[rows] = total[rows] * decay + exponentials.sum(1, keepdim=True)
            peak[rows] = new_peak
        lse = (peak + total.log()).squeeze(1)
        entropy = (total.log() - moment / total).squeeze(1) if with_entropy else None
        ctx.save_for_backward(hidden, weight, bias, targets, lse, entropy if entropy_grad else None)
        ctx.tiling = tiling
        if entropy is not None and not entropy_grad:
            ctx.mark_non_differentiable(entropy)
        return selected.squeeze(1) - lse, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_logprobs: Tensor, grad_entropy: Tensor | None) -> tuple[Any, ...]:
        hidden, weight, bias, targets, lse, entropy = ctx.saved_tensors
        want_hidden, want_weight, want_bias = ctx.needs_input_grad[:3]
        grad_entropy = None if entropy is None else grad_entropy
        tiles = _Tiles(hidden, weight, bias, ctx.tiling, spare=grad_entropy is not None)
        lse, up = lse.unsqueeze(1), grad_logprobs.unsqueeze(1)
        # d / dz = row_scale * tile. Without an entropy gradient the upstream one is a factor of the whole row.
        row_scale = (-up if grad_entropy is None else -torch.ones_like(up)) / ctx.tiling[0]
        grad_hidden = torch.zeros_like(tiles.hidden) if want_hidden else None
        # Every element of the weight's gradient is written below, unless there is no token.
        grad_weight = (weight.new_empty if tiles.tokens else weight.new_zeros)(weight.shape) if want_weight else None
        grad_bias = tiles.new(tiles.vocab).zero_() if want_bias else None
        scaled_hidden = hidden.to(tiles.dtype) * row_scale if want_weight else None
        # Gradient of one slice of the weight, where the weight's dtype is narrower.
        sums = tiles.new(tiles.chunk_vocab, weight.shape[1]) if want_weight and tiles.narrower else None
        for rows, columns, weight_rows, (tile, *spare) in tiles:
            column, inside = _in_tile(targets[rows], columns)
            tile.sub_(lse[rows])
            if grad_entropy is None:
                tile.exp_().scatter_add_(1, column, -inside.to(tiles.dtype))
            else:
                probs = torch.exp(tile.clamp_(min=_LOG_ZERO), out=spare[0])
                tile.add_(entropy[rows, None]).mul_(grad_entropy[rows, None]).add_(up[rows]).mul_(probs)
                tile.scatter_add_(1, column, -up[rows] * inside)
            if grad_hidden is not None:
                grad_hidden[rows].addmm_(tile, weight_rows)
            if grad_weight is not None and scaled_hidden is not None:
                out = grad_weight[columns] if sums is None else sums[: len(weight_rows)]
                out.addmm_(tile.t(), scaled_hidden[rows], beta=0.0 if rows.start == 0 else 1.0)
                if sums is not None and rows.stop == tiles.tokens:
                    grad_weight[columns] = out
            if grad_bias is not None:
                grad_bias[columns].addmv_(tile.t(), row_scale[rows, 0])
        if grad_hidden is not None:
            grad_hidden = grad_hidden.mul_(row_scale).to(hidden.dtype)
        if grad_bias is not None:
            grad_bias = grad_bias.to(bias.dtype)
        return grad_hidden, grad_weight, grad_bias, None, None, None, None


def _check_tensors(hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None) -> None:
    tensors = {"hidden": hidden, "weight": weight, "targets": targets} | ({} if bias is None else {"bias": bias})
    fits = (
        [t.dim() for t in tensors.values()] == [2, 2, 1, 1][: len(tensors)]
        and hidden.shape[1] == weight.shape[1] and len(targets) == len(hidden)
        and (bias is None or len(bias) == len(weight)) and targets.dtype == torch.int64
        and all(t.is_floating_point() for name, t in tensors.items() if name != "targets")
    )  # fmt: skip
    if not fits:
        got = {name: (str(t.dtype), *t.shape) for name, t in tensors.items()}
        expected = "float hidden [n, H], float weight [V, H], int64 targets [n], float bias [V]"
        raise TrainingError("head inputs do not fit together", key="shapes", value=got, expected=expected)
    # One synchronisation a call: a stray target would otherwise be read as the logit 0.
    if len(targets) and bool(((targets < 0) | (targets >= len(weight))).any()):
        found = f"{int(targets.min())}..{int(targets.max())}"
        expected = f"0..{len(weight) - 1}, without padding and ignored positions (such as -100)"
        raise TrainingError("token ids outside the vocabulary", key="targets", value=found, expected=expected)
