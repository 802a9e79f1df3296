"""Keyed sampling: every draw is a pure function of (seed, ordinal, index, position); and where a completion stops.

A token is drawn by inverse CDF from one uniform number of its row and position alone. With it comes its log-prob under
the full (untruncated) distribution at the sampling temperature: the behaviour log-prob.
"""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from rlkit.types import SamplingParams

ROW_CHUNK_ELEMENTS = 1 << 22


def uniforms(seed: int, ordinal: int, index: int, count: int) -> NDArray[np.float64]:
    """The `count` uniform numbers in [0, 1) of one sample, [count]; the first k do not depend on count."""
    key = np.random.SeedSequence([seed, ordinal, index])
    return np.random.Generator(np.random.Philox(key)).random(count)


def draw(logits: Tensor, uniform: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """logits [B, V], uniform [B] float64 in [0, 1) -> tokens [B] int64, log-probs [B] float32 at `temperature`.

    Temperature 0 is argmax, with log-probs at temperature 1.
    """
    tokens, logprobs = [], []
    rows = max(1, ROW_CHUNK_ELEMENTS // logits.shape[-1])
    for part, u in zip(logits.split(rows), uniform.split(rows), strict=True):
        log_probabilities = torch.log_softmax(part.float() / (temperature or 1.0), dim=-1)
        if temperature == 0:
            token = part.argmax(dim=-1)
        else:
            # float64: over 100,000 float32 terms the sum's error would be larger than rare tokens.
            cumulative = log_probabilities.double().exp_().cumsum(dim=-1)
            threshold = (u * cumulative[:, -1]).unsqueeze(1)
            token = torch.searchsorted(cumulative, threshold, right=True).squeeze(1).clamp_max(logits.shape[-1] - 1)
        tokens.append(token)
        logprobs.append(log_probabilities.gather(1, token.unsqueeze(1)).squeeze(1))
    return torch.cat(tokens), torch.cat(logprobs)


def stop_positions(
    tokens: Tensor, done: int, sampling: SamplingParams, tokenizer: PreTrainedTokenizerBase
) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Tokens of each row up to and including the one that stops it, and whether one does, [B] each.

    tokens [B, T], of which the first `done` hold no stop. Rows without one have length T.
    """
    fresh = tokens[:, done:].cpu().numpy()
    hit = np.isin(fresh, list(sampling.stop_token_ids))
    stopped: NDArray[np.bool_] = np.any(hit, axis=1)
    lengths = np.where(stopped, done + hit.argmax(axis=1) + 1, tokens.shape[1])
    if sampling.stop_strings:
        start = max(0, done - max(map(len, sampling.stop_strings)) - 8)  # a string may begin in an earlier stretch
        for row, ids in enumerate(tokens[:, start:].tolist()):
            if any(s in tokenizer.decode(ids[: lengths[row] - start]) for s in sampling.stop_strings):
                ends = range(done - start + 1, lengths[row] - start + 1)
                texts = ((end, tokenizer.decode(ids[:end])) for end in ends)
                end = next(end for end, text in texts if any(s in text for s in sampling.stop_strings))
                lengths[row], stopped[row] = start + end, True
    return lengths, stopped
