"""The embedded engine: a transformers model sampled in the learner's own process, on the learner's weights.

A batch is generated in stretches of `compact_every` tokens, in a thread: verifiers and lease heartbeats go on
meanwhile. After each stretch finished rows leave the batch and its key-value cache.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from rlkit.buffer.snapshots import Snapshot, checksum
from rlkit.errors import ConfigError, EngineError
from rlkit.rollout.decode import steps
from rlkit.rollout.engine import GenerationRequest
from rlkit.rollout.sampler import draw, stop_positions, uniforms
from rlkit.rollout.verification import probe_logprobs
from rlkit.settings import Checked, number
from rlkit.types import FloatArray, IntArray, Rollout, SamplingParams, VersionSpan

ROOM_TOKENS = 32  # the key-value cache grows by so many at a time


class TransformersEngine(Checked):
    """Settings of the embedded engine (a component: `open` makes the engine)."""

    compact_every: int = number(8, 1)  # tokens between two removals of finished rows
    max_batch_samples: int = number(256, 1)  # rows generated at a time; bounds the key-value cache
    takes_turns: bool = False  # a worker's engine and the learner use their one device in turn
    in_process: ClassVar[bool] = True  # `open` takes the model itself
    devices: ClassVar[int] = 1

    def open(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, check_stop: Callable[[], None], rank: int = 0
    ) -> EmbeddedEngine:
        """Serve `model` (shared, not copied) on a learner rank. `check_stop` raises when the run is to end.

        Raises ConfigError for a model whose cache keeps more than keys and values: its rows cannot be taken out.
        """
        kinds = {type(layer) for layer in DynamicCache(config=model.config).layers}
        if others := kinds - {DynamicLayer, DynamicSlidingWindowLayer}:
            problem = f"the embedded engine cannot sample {model.config.model_type}: {next(iter(others)).__name__}"
            raise ConfigError(problem, key="rollout.engine", value="TransformersEngine", expected="an attention model")
        return EmbeddedEngine(self, model, tokenizer, check_stop, f"embedded-{rank}")


class RoomyLayer(DynamicLayer):
    """A cache layer that grows in place, `ROOM_TOKENS` at a time, instead of being copied for every token."""

    room: tuple[Tensor, Tensor] | None = None  # keys and values [B, heads, allocated tokens, width]; a prefix is used

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        used = self.get_seq_length()
        length = used + key_states.shape[-2]
        if self.room is None or self.room[0].shape[-2] < length:
            self.lazy_initialization(key_states, value_states)
            fresh = (x.new_empty(*x.shape[:-2], length + ROOM_TOKENS, x.shape[-1]) for x in (key_states, value_states))
            old, self.room = self.room, (next(fresh), next(fresh))
            for room, before in zip(self.room, old or (), strict=False):
                room[..., :used, :] = before[..., :used, :]
        for room, new in zip(self.room, (key_states, value_states), strict=True):
            room[..., used:length, :] = new
        self.keys, self.values = (room[..., :length, :] for room in self.room)
        return self.keys, self.values

    def batch_select_indices(self, indices: Tensor) -> None:
        """Rows that stay where they are cost nothing, unless there are more than before."""
        assert self.room is not None
        rows, length = len(self.room[0]), self.get_seq_length()
        if len(indices) > rows:
            self.room = self.room[0][:, :, :length][indices], self.room[1][:, :, :length][indices]
        else:
            moved = (indices != torch.arange(len(indices), device=indices.device)).nonzero().squeeze(1)
            for room in self.room:
                room[moved, :, :length] = room[indices[moved], :, :length]
            self.room = self.room[0][: len(indices)], self.room[1][: len(indices)]
        self.keys, self.values = (room[..., :length, :] for room in self.room)


@dataclass(slots=True)
class _Batch:
    """Rows still being generated; all tensors have the rows of `requests`."""

    requests: list[GenerationRequest]
    attention_mask: Tensor  # [B, prompt width], left padded
    uniforms: Tensor  # [B, max_tokens] float64
    tokens: Tensor  # [B, tokens so far]
    logprobs: Tensor  # [B, tokens so far] float32
    cache: Any  # transformers Cache
    logits: Tensor | None  # [B, V] of the first token; None once it is drawn


@dataclass(slots=True)
class EmbeddedEngine:
    """Implements `rlkit.rollout.engine.Engine` on a model of this process."""

    settings: TransformersEngine
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    check_stop: Callable[[], None]
    engine_id: str
    version: int = 0  # of the shared weights
    generating: int = 0  # calls of `generate` under way
    in_flight: ClassVar[bool] = False

    @property
    def capacity(self) -> int:
        return self.settings.max_batch_samples

    async def generate(
        self, requests: Sequence[GenerationRequest], sampling: SamplingParams
    ) -> AsyncGenerator[list[Rollout], None]:
        """Yield rollouts as they finish; raises what `check_stop` raises between stretches.

        What is yielded is dealt with while the next stretch is computed.
        """
        self.generating += 1
        under_way: asyncio.Task[Any] | None = None
        try:
            size = self.settings.max_batch_samples
            for start in range(0, len(requests), size):
                batch = await asyncio.to_thread(self._prefill, list(requests[start : start + size]), sampling)
                finished: list[Rollout] = []
                while batch is not None:
                    self.check_stop()
                    under_way = asyncio.create_task(asyncio.to_thread(self._stretch, batch, sampling))
                    await asyncio.sleep(0)  # the thread starts now, also where the caller blocks
                    if finished:
                        yield finished
                    batch, finished = await asyncio.shield(under_way)
                yield finished
        finally:
            if under_way is not None:  # a thread cannot be cancelled; the weights are in use until it is done
                await asyncio.wait([under_way])
            self.generating -= 1

    @torch.inference_mode()
    def _prefill(self, requests: list[GenerationRequest], sampling: SamplingParams) -> _Batch:
        """Read every distinct prompt once; its samples then share what was computed."""
        device = self.model.device
        distinct = {request.prompt_token_ids.tobytes(): request.prompt_token_ids for request in requests}
        place = {key: number for number, key in enumerate(distinct)}
        owner = torch.tensor([place[request.prompt_token_ids.tobytes()] for request in requests], device=device)
        prompts = [torch.from_numpy(tokens) for tokens in distinct.values()]
        left_padded = partial(pad_sequence, batch_first=True, padding_side="left")
        mask = left_padded([torch.ones_like(prompt) for prompt in prompts]).to(device)
        draws = np.stack([uniforms(sampling.seed, r.ordinal, r.index, sampling.max_tokens) for r in requests])
        cache = DynamicCache(config=self.model.config)
        cache.layers = [RoomyLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]
        # A bare forward does not count positions past padding as it should.
        positions = (mask.cumsum(dim=1) - 1).clamp_(min=0)
        if self.model.training:
            self.model.eval()  # without dropout; the learner turns training on again itself
        logits = self.model(
            input_ids=left_padded(prompts).to(device), attention_mask=mask, position_ids=positions,
            past_key_values=cache, use_cache=True, logits_to_keep=1,
        ).logits[:, -1]  # fmt: skip
        cache.batch_select_indices(owner)
        return _Batch(
            requests=requests, attention_mask=mask[owner], uniforms=torch.from_numpy(draws).to(device), cache=cache,
            tokens=owner.new_empty(len(requests), 0), logprobs=torch.empty(len(requests), 0, device=device),
            logits=logits[owner],
        )  # fmt: skip

    @torch.inference_mode()
    def _stretch(self, batch: _Batch, sampling: SamplingParams) -> tuple[_Batch | None, list[Rollout]]:
        """Generate up to `compact_every` tokens; return the open rows and the finished rollouts."""
        done = batch.tokens.shape[1]
        stop = min(done + self.settings.compact_every, sampling.max_tokens)
        mask = torch.cat([batch.attention_mask, batch.attention_mask.new_ones(len(batch.requests), stop)], dim=1)
        step = steps(self.model, batch.cache, mask, batch.attention_mask.shape[1], max(1, done))
        tokens, logprobs = list(batch.tokens.unbind(1)), list(batch.logprobs.unbind(1))
        for position in range(done, stop):
            if batch.logits is None:
                logits = step(tokens[-1], position)
            else:
                logits, batch.logits = batch.logits, None
            token, logprob = draw(logits, batch.uniforms[:, position], sampling.temperature)
            tokens.append(token)
            logprobs.append(logprob)
        batch.tokens, batch.logprobs = torch.stack(tokens, dim=1), torch.stack(logprobs, dim=1)
        return self._compact(batch, sampling, done)

    def _compact(self, batch: _Batch, sampling: SamplingParams, done: int) -> tuple[_Batch | None, list[Rollout]]:
        """Take out the rows that stopped after `done` tokens, or are as long as they may be."""
        lengths, stopped = stop_positions(batch.tokens, done, sampling, self.tokenizer)
        over = stopped if batch.tokens.shape[1] < sampling.max_tokens else np.ones_like(stopped)
        if not over.any():
            return batch, []
        rows = np.flatnonzero(over)
        tokens, logprobs = batch.tokens.cpu().numpy(), batch.logprobs.float().cpu().numpy()
        chosen = [tokens[row, : lengths[row]] for row in rows]
        texts = self.tokenizer.batch_decode([own.tolist() for own in chosen], skip_special_tokens=True)
        finished = [
            Rollout(
                ordinal=batch.requests[row].ordinal, index=batch.requests[row].index, token_ids=own.copy(),
                behavior_logprobs=logprobs[row, : len(own)].copy(), loss_mask=np.ones(len(own), dtype=np.bool_),
                segments=np.zeros(len(own), dtype=np.int64), engine_id=self.engine_id, text=text,
                version_spans=(VersionSpan(version=self.version, start=0, end=len(own)),),
                finish_reason="stop" if stopped[row] else "length",
            )
            for row, own, text in zip(rows, chosen, texts, strict=True)
        ]  # fmt: skip
        if over.all():
            return None, finished
        # The last open rows move into the places of finished ones; the others stay where they are.
        places = np.arange(np.count_nonzero(~over))
        places[over[: len(places)]] = len(places) + np.flatnonzero(~over[len(places) :])
        keep = torch.from_numpy(places).to(batch.tokens.device)
        batch.cache.batch_select_indices(keep)
        batch.requests = [batch.requests[row] for row in places]
        for name in ("attention_mask", "uniforms", "tokens", "logprobs"):
            setattr(batch, name, getattr(batch, name)[keep])
        return batch, finished

    async def update_weights(self, version: int, snapshot: Snapshot | None) -> None:
        """Only the label changes where the weights are shared. Refused while tokens are being sampled."""
        if self.generating:
            problem, fix = "the embedded engine cannot change weights while it generates", "update between steps"
            raise EngineError(problem, key="version", value=version, expected="an idle engine", fix=fix)
        if snapshot is not None:
            tensors, parameters = load_snapshot(snapshot), dict(self.model.named_parameters())
            if wrong := sorted(tensors.keys() ^ parameters.keys()):
                expected = f"the parameters of this model, not {wrong[:3]}"
                raise EngineError("of another model", key="snapshot", value=snapshot.path, expected=expected)
            with torch.no_grad():
                for name, tensor in tensors.items():
                    parameters[name].copy_(tensor)
        self.version = version

    async def score(self, token_ids: IntArray) -> dict[str, FloatArray]:
        return {self.engine_id: probe_logprobs(self.model, token_ids)}

    async def healthy(self) -> None:
        """It is as healthy as this process."""

    async def move(self, asleep: bool) -> None:
        """Its weights stay where they are."""

    async def close(self) -> None:
        """Nothing to stop."""


def load_snapshot(snapshot: Snapshot) -> dict[str, Tensor]:
    """Tensors by name. EngineError for a file that is gone, torn or altered: nothing of it is used."""
    path, found = Path(snapshot.path), "no such file"
    with contextlib.suppress(FileNotFoundError):
        if (found := checksum(path)) == snapshot.checksum:
            return load_file(path)
    fix = "the learner writes one with each step; if it comes back, look at the disk"
    problem = f"version {snapshot.version} cannot be used: {found}"
    raise EngineError(problem, key="snapshot", value=snapshot.path, expected=snapshot.checksum, fix=fix)
