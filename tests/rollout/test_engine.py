"""The embedded engine: keyed draws, compaction and log-probs."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest
import torch

from rlkit.config.schema import ModelConfig
from rlkit.errors import ConfigError, EngineError
from rlkit.learner.model import load_model, load_tokenizer
from rlkit.rollout.engine import GenerationRequest
from rlkit.rollout.sampler import draw, uniforms
from rlkit.rollout.transformers_engine import TransformersEngine
from rlkit.types import Rollout, SamplingParams

MODEL = ModelConfig(
    architecture={
        "model_type": "llama",
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "intermediate_size": 48,
        "max_position_embeddings": 64,
        "tie_word_embeddings": True,
    },
    alphabet="0123456789+=",
)
TOKENIZER = load_tokenizer(MODEL)
REQUESTS = [
    GenerationRequest(ordinal=i // 4, index=i % 4, prompt_token_ids=np.arange(4, 5 + i // 4)) for i in range(32)
]


def sampling(**changes) -> SamplingParams:
    settings = {"temperature": 1.0, "max_tokens": 24, "seed": 5, "stop_token_ids": (2,)} | changes
    return SamplingParams(**settings)


def score(model, prompts, completions, temperature: float) -> list[np.ndarray]:
    """Full log-softmax of a plain forward, one sequence at a time: slow, independent, exact."""
    out = []
    for prompt, completion in zip(prompts, completions, strict=True):
        ids = torch.from_numpy(np.concatenate([prompt, completion]))[None]
        with torch.no_grad():
            logits = model(input_ids=ids).logits[0, len(prompt) - 1 : -1].float()
        table = torch.log_softmax(logits / temperature, dim=-1)
        out.append(table.gather(1, ids[0, len(prompt) :, None]).squeeze(1).numpy())
    return out


def generate(compact_every: int, rows: int, params: SamplingParams) -> dict[tuple, Rollout]:
    model = load_model(MODEL, TOKENIZER, torch.float32, 0)
    settings = TransformersEngine(compact_every=compact_every, max_batch_samples=rows)
    engine = settings.open(model, TOKENIZER, lambda: None)

    async def run() -> list[Rollout]:
        return [r async for part in engine.generate(REQUESTS, params) for r in part]

    rollouts = asyncio.run(run())
    prompts = [np.arange(4, 5 + r.ordinal) for r in rollouts]
    completions = [r.token_ids for r in rollouts]
    scored = score(engine.model, prompts, completions, params.temperature or 1.0)
    for rollout, logprobs in zip(rollouts, scored, strict=True):
        np.testing.assert_allclose(rollout.behavior_logprobs, logprobs, atol=1e-5)
    return {(r.ordinal, r.index): r for r in rollouts}


def test_samples_do_not_depend_on_stretches_or_batches():
    expected = generate(24, 32, sampling())
    assert len(expected) == 32
    assert {r.finish_reason for r in expected.values()} == {"stop", "length"}
    for compact_every, rows in ((1, 32), (5, 32), (7, 9), (3, 1)):
        got = generate(compact_every, rows, sampling())
        for key, rollout in expected.items():
            np.testing.assert_array_equal(got[key].token_ids, rollout.token_ids)


def test_another_seed_another_temperature_and_greedy_differ():
    first = generate(8, 32, sampling())
    other = generate(8, 32, sampling(seed=6))
    cold = generate(8, 32, sampling(temperature=0.5))
    greedy = generate(8, 32, sampling(temperature=0))
    for rival in (other, cold):
        assert any(not np.array_equal(rival[k].token_ids, r.token_ids) for k, r in first.items())
    for (ordinal, index), rollout in greedy.items():
        np.testing.assert_array_equal(rollout.token_ids, greedy[ordinal, 0].token_ids), index


def test_stop_strings_end_a_completion_where_they_appear():
    rollouts = generate(8, 32, sampling(stop_strings=("+", "77")))
    stopped = [r for r in rollouts.values() if "+" in r.text]
    assert stopped
    assert all(r.text.index("+") == len(r.text) - 1 for r in stopped)


def test_draws_follow_the_distribution():
    # Inverse CDF with uniform numbers: frequencies agree with softmax(logits / temperature).
    logits = torch.tensor([[2.0, 0.0, -1.0, 1.0, -torch.inf]])
    count = 40_000
    u = torch.from_numpy(uniforms(0, 0, 0, count))
    tokens, logprobs = draw(logits.expand(count, -1), u, 0.8)
    probabilities = torch.softmax(logits[0] / 0.8, -1)
    frequencies = torch.bincount(tokens, minlength=5) / count
    assert (frequencies - probabilities).abs().max() < 5 * (0.25 / count) ** 0.5
    assert frequencies[4] == 0
    torch.testing.assert_close(logprobs, probabilities.log()[tokens])


def test_uniforms_are_keyed_and_prefix_stable():
    np.testing.assert_array_equal(uniforms(1, 2, 3, 10), uniforms(1, 2, 3, 99)[:10])
    assert not np.array_equal(uniforms(1, 2, 3, 10), uniforms(1, 3, 2, 10))


def test_a_model_with_other_caches_than_keys_and_values_is_refused_at_once():
    layers = ["full_attention", "conv"]
    config = {
        "model_type": "lfm2",
        "layer_types": layers,
        **{k: v for k, v in MODEL.architecture.items() if k != "model_type"},
    }
    model = load_model(ModelConfig(architecture=config, alphabet=MODEL.alphabet), TOKENIZER, torch.float32, 0)
    with pytest.raises(
        ConfigError, match=r"cannot sample lfm2(.|\n)*rollout.engine|rollout.engine(.|\n)*cannot sample lfm2"
    ):
        TransformersEngine().open(model, TOKENIZER, lambda: None)


def test_weights_cannot_change_under_a_running_generation():
    model = load_model(MODEL, TOKENIZER, torch.float32, 0)
    engine = TransformersEngine(compact_every=1).open(model, TOKENIZER, lambda: None)
    request = GenerationRequest(ordinal=0, index=0, prompt_token_ids=np.array([4, 5]))
    other = GenerationRequest(ordinal=1, index=0, prompt_token_ids=np.array([4, 6]))

    async def run() -> None:
        stream = engine.generate([request, other], sampling(temperature=2.0))
        async for _ in stream:
            with pytest.raises(EngineError, match="while it generates"):
                await engine.update_weights(1, None)
        await engine.update_weights(1, None)

    asyncio.run(run())
    assert engine.version == 1
