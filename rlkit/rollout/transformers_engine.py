"""The embedded engine: transformers' `generate` in the learner's own process.

It shares the learner's weights, so publishing a version costs nothing and log-probs agree to rounding. A batch is
generated in stretches of `compact_every` tokens, in a thread: verifiers and lease heartbeats go on meanwhile. After
each stretch finished rows leave the batch and its key-value cache.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from rlkit.errors import ConfigError, EngineError
from rlkit.rollout.engine import GenerationRequest
from rlkit.rollout.sampler import KeyedSampler, StopTracker, uniforms
from rlkit.types import FloatArray, IntArray, Rollout, SamplingParams, VersionSpan


@dataclass(frozen=True, slots=True)
class TransformersEngine:
    """Settings of the embedded engine (a component: `open` makes the engine)."""

    compact_every: int = 16  # tokens between two removals of finished rows
    max_batch_samples: int = 256  # rows generated at a time; bounds the key-value cache

    def __post_init__(self) -> None:
        for key, value in (("compact_every", self.compact_every), ("max_batch_samples", self.max_batch_samples)):
            if value < 1:
                raise ConfigError("out of range", key=key, value=value, expected="1 or more")

    def open(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, check_stop: Callable[[], None]
    ) -> EmbeddedEngine:
        """Serve `model` (shared, not copied). `check_stop` raises when the run is to end."""
        return EmbeddedEngine(self, model, tokenizer, check_stop)


@dataclass(slots=True)
class _Batch:
    """Rows still being generated; all tensors have the rows of `requests`."""

    requests: list[GenerationRequest]
    input_ids: Tensor  # [B, prompt_width + tokens so far], left padded
    attention_mask: Tensor  # [B, prompt_width]
    uniforms: Tensor  # [B, max_tokens] float64
    lengths: Tensor  # [B] tokens generated
    logprobs: Tensor  # [B, tokens so far] float32
    prompt_width: int
    cache: Any = None  # transformers Cache


@dataclass(slots=True)
class EmbeddedEngine:
    """Implements `rlkit.rollout.engine.Engine` on a model of this process."""

    settings: TransformersEngine
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    check_stop: Callable[[], None]
    engine_id: str = "embedded-0"
    version: int = 0  # of the shared weights
    generating: int = 0  # calls of `generate` under way

    async def generate(
        self, requests: Sequence[GenerationRequest], sampling: SamplingParams
    ) -> AsyncGenerator[Rollout, None]:
        """Yield rollouts as they finish; raises what `check_stop` raises between stretches."""
        self.generating += 1
        try:
            size = self.settings.max_batch_samples
            for start in range(0, len(requests), size):
                batch: _Batch | None = self._start(list(requests[start : start + size]), sampling)
                while batch is not None:
                    self.check_stop()
                    batch, finished = await asyncio.to_thread(self._stretch, batch, sampling)
                    for rollout in finished:
                        yield rollout
        finally:
            self.generating -= 1

    def _start(self, requests: list[GenerationRequest], sampling: SamplingParams) -> _Batch:
        left_padded = partial(pad_sequence, batch_first=True, padding_side="left")
        prompts = [torch.tensor(r.prompt_token_ids) for r in requests]
        draws = np.stack([uniforms(sampling.seed, r.ordinal, r.index, sampling.max_tokens) for r in requests])
        device = self.model.device
        return _Batch(
            requests=requests,
            input_ids=left_padded(prompts, padding_value=self.tokenizer.pad_token_id).to(device),
            attention_mask=left_padded([torch.ones_like(p) for p in prompts]).to(device),
            uniforms=torch.from_numpy(draws).to(device),
            lengths=torch.zeros(len(requests), dtype=torch.long, device=device),
            logprobs=torch.empty(len(requests), 0, device=device),
            prompt_width=max(map(len, prompts)),
        )

    @torch.no_grad()
    def _stretch(self, batch: _Batch, sampling: SamplingParams) -> tuple[_Batch | None, list[Rollout]]:
        """Generate up to `compact_every` tokens; return the open rows and the finished rollouts."""
        done = batch.input_ids.shape[1] - batch.prompt_width
        count = min(self.settings.compact_every, sampling.max_tokens - done)
        sampler = KeyedSampler(batch.uniforms, batch.prompt_width, sampling.temperature)
        tracker = StopTracker(batch.lengths, batch.prompt_width, sampling, self.tokenizer)
        generated = batch.attention_mask.new_ones(len(batch.requests), done)
        mask = torch.cat([batch.attention_mask, generated], dim=1)
        was_training, defaults = self.model.training, self.model.generation_config
        settings = GenerationConfig(
            do_sample=False, max_new_tokens=count, pad_token_id=self.tokenizer.pad_token_id,
            return_dict_in_generate=True, use_cache=True,
        )  # fmt: skip
        self.model.eval()
        # generate() fills unset fields from the model's own generation config, where a repetition penalty or top-k
        # would bias the distribution: replace it for the call.
        self.model.generation_config = GenerationConfig()
        try:
            generate: Any = self.model.generate
            output = generate(
                batch.input_ids, attention_mask=mask, past_key_values=batch.cache, generation_config=settings,
                logits_processor=[sampler], stopping_criteria=[tracker],
            )  # fmt: skip
        finally:
            self.model.generation_config = defaults
            self.model.train(was_training)
        steps = output.sequences.shape[1] - batch.input_ids.shape[1]
        batch.input_ids, batch.cache = output.sequences, output.past_key_values
        batch.logprobs = torch.cat([batch.logprobs, torch.stack(sampler.logprobs[:steps], dim=1)], dim=1)
        batch.lengths = tracker.lengths
        return self._compact(batch, tracker)

    def _compact(self, batch: _Batch, tracker: StopTracker) -> tuple[_Batch | None, list[Rollout]]:
        done = torch.nonzero(tracker.finished).flatten().tolist()
        finished = [self._rollout(batch, row, stopped=bool(tracker.stopped[row])) for row in done]
        if not finished:
            return batch, []
        keep = torch.nonzero(~tracker.finished).flatten()
        if len(keep) == 0:
            return None, finished
        batch.cache.batch_select_indices(keep)
        batch.requests = [batch.requests[row] for row in keep.tolist()]
        for name in ("input_ids", "attention_mask", "uniforms", "lengths", "logprobs"):
            setattr(batch, name, getattr(batch, name)[keep])
        return batch, finished

    def _rollout(self, batch: _Batch, row: int, *, stopped: bool) -> Rollout:
        request, length = batch.requests[row], int(batch.lengths[row])
        tokens = batch.input_ids[row, batch.prompt_width :][:length].cpu().numpy().astype(np.int64)
        return Rollout(
            ordinal=request.ordinal, index=request.index, token_ids=tokens, engine_id=self.engine_id,
            behavior_logprobs=batch.logprobs[row, :length].float().cpu().numpy(),
            loss_mask=np.ones(length, dtype=np.bool_),
            segments=np.zeros(length, dtype=np.int64),
            version_spans=(VersionSpan(version=self.version, start=0, end=length),),
            finish_reason="stop" if stopped else "length",
            text=str(self.tokenizer.decode(tokens, skip_special_tokens=True)),
        )  # fmt: skip

    async def score(
        self, prompts: Sequence[IntArray], completions: Sequence[IntArray], temperature: float
    ) -> list[FloatArray]:
        """Full log-softmax of a plain forward, one sequence at a time: slow, independent, exact."""
        out = []
        for prompt, completion in zip(prompts, completions, strict=True):
            ids = torch.from_numpy(np.concatenate([prompt, completion]))[None].to(self.model.device)
            with torch.no_grad():
                logits = self.model(input_ids=ids).logits[0, len(prompt) - 1 : -1].float()
            table = torch.log_softmax(logits / temperature, dim=-1)
            out.append(table.gather(1, ids[0, len(prompt) :, None]).squeeze(1).cpu().numpy())
        return out

    async def update_weights(self, version: int, snapshot: Path | None) -> None:
        """The weights are shared: only the label changes. Refused while tokens are being sampled."""
        if self.generating:
            problem, fix = "the embedded engine cannot change weights while it generates", "update between steps"
            raise EngineError(problem, key="version", value=version, expected="an idle engine", fix=fix)
        self.version = version

    async def close(self) -> None:
        """Nothing to stop."""
