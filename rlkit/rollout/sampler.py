"""Keyed sampling inside `generate`: every draw is a pure function of (seed, ordinal, index, position).

A token is drawn by inverse CDF from one uniform number of its row and position alone: a run is reproducible, resumes on
the same draws, and finished rows can leave a batch without changing the others. `KeyedSampler` leaves only the drawn
token finite for `generate` to pick greedily, and records the draw's log-prob under the full (untruncated) distribution
at the sampling temperature: the behaviour log-prob. No [batch, steps, vocabulary] tensor is kept.
"""

from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import LogitsProcessor, PreTrainedTokenizerBase, StoppingCriteria

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
            token = torch.searchsorted(cumulative, threshold, right=True).squeeze(1)
            token = token.clamp_max(logits.shape[-1] - 1)
        tokens.append(token)
        logprobs.append(log_probabilities.gather(1, token.unsqueeze(1)).squeeze(1))
    return torch.cat(tokens), torch.cat(logprobs)


@dataclass(eq=False)
class KeyedSampler(LogitsProcessor):
    """Draws the next token of every row and records its log-prob; one instance a `generate` call."""

    uniforms: Tensor  # [B, max_tokens] float64
    prompt_width: int  # padded prompt length: position = width of input_ids - prompt_width
    temperature: float
    logprobs: list[Tensor] = field(default_factory=list)  # [B], one a step

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # type: ignore[override]
        """Return scores with the drawn token at 0 and everything else at -inf, [B, V]."""
        position = input_ids.shape[1] - self.prompt_width
        token, logprob = draw(scores, self.uniforms[:, position], self.temperature)
        self.logprobs.append(logprob)
        return torch.full_like(scores, -torch.inf).scatter_(1, token.unsqueeze(1), 0.0)


@dataclass(eq=False)
class StopTracker(StoppingCriteria):
    """Marks rows finished by a stop token, a stop string or their length, and keeps the lengths."""

    lengths: Tensor  # [B] tokens generated
    prompt_width: int
    sampling: SamplingParams
    tokenizer: PreTrainedTokenizerBase

    def __post_init__(self) -> None:
        self.stopped = torch.zeros_like(self.lengths, dtype=torch.bool)
        # `generate` reads this attribute and pads rows after they finish.
        self.eos_token_id = torch.tensor(list(self.sampling.stop_token_ids), device=self.lengths.device)
        self.window = max(map(len, self.sampling.stop_strings), default=0) + 8

    @property
    def finished(self) -> Tensor:
        """[B] bool: stopped, or at the length limit."""
        return self.stopped | (self.lengths >= self.sampling.max_tokens)

    def __call__(self, input_ids: Tensor, scores: object, **_: object) -> Tensor:  # type: ignore[override]
        """Take note of the newest column; return which rows are done, [B] bool."""
        open_rows = ~self.finished
        self.lengths = self.lengths + open_rows.long()
        hit = torch.isin(input_ids[:, -1], self.eos_token_id)
        if self.sampling.stop_strings:
            start = max(self.prompt_width, input_ids.shape[1] - self.window)
            for row in torch.nonzero(open_rows & ~hit).flatten().tolist():
                tail = self.tokenizer.decode(input_ids[row, start:])
                hit[row] = any(s in tail for s in self.sampling.stop_strings)
        self.stopped = self.stopped | (open_rows & hit)
        return self.finished
