"""The decoding step written out gives what the model's own forward gives, and what the learner computes."""

import asyncio

import numpy as np
import pytest
import torch
from transformers import DynamicCache

from rlkit.config.schema import ModelConfig
from rlkit.learner.batching import TrainingSequence
from rlkit.learner.model import load_model, load_tokenizer
from rlkit.learner.policy import Policy
from rlkit.rollout import decode
from rlkit.rollout.decode import model_steps, own_steps, written_out
from rlkit.rollout.engine import GenerationRequest
from rlkit.rollout.transformers_engine import RoomyLayer, TransformersEngine
from rlkit.types import Rollout, SamplingParams

SHARED = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
WRITTEN_OUT = {
    "llama": {"model_type": "llama", "tie_word_embeddings": True},
    "llama, biases, other rotary angles": {
        "model_type": "llama",
        "attention_bias": True,
        "mlp_bias": True,
        "rope_parameters": LLAMA3_ROPE,
        "num_key_value_heads": 4,
    },
    "mistral": {"model_type": "mistral", "sliding_window": None},
    "qwen2": {"model_type": "qwen2", "tie_word_embeddings": True},
    "qwen3": {"model_type": "qwen3", "head_dim": 16, "num_key_value_heads": 1},
}
LEFT_ALONE = {
    "gemma": {"model_type": "gemma", "head_dim": 16},
    "a window": {
        "model_type": "qwen2",
        "use_sliding_window": True,
        "sliding_window": 8,
        "layer_types": ["full_attention", "sliding_attention"],
    },
    "a window everywhere": {"model_type": "mistral", "sliding_window": 8},
    "angles that change": {
        "model_type": "llama",
        "rope_parameters": {"rope_type": "dynamic", "rope_theta": 500.0, "factor": 2.0},
    },
}
TOKENIZER = load_tokenizer(ModelConfig(architecture=SHARED | WRITTEN_OUT["llama"], alphabet="0123456789+="))
# Prompts of 1 to 7 tokens, three samples each.
REQUESTS = [
    GenerationRequest(ordinal=i // 3, index=i % 3, prompt_token_ids=np.arange(4, 5 + i // 3)) for i in range(21)
]
SAMPLING = SamplingParams(temperature=0.8, max_tokens=22, seed=3, stop_token_ids=(2, 5))


def model_of(changes: dict, dtype: torch.dtype = torch.float32):
    config = ModelConfig(architecture=SHARED | changes, alphabet="0123456789+=")
    model = load_model(config, TOKENIZER, dtype, 0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():  # far from where they start: norms are not 1, biases not 0, logits not flat
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model


def sampled(model) -> list[Rollout]:
    """Two calls of one engine, the weights changed between them."""
    engine = TransformersEngine(compact_every=4, max_batch_samples=15).open(model, TOKENIZER, lambda: None)

    async def run() -> list[Rollout]:
        found = [r async for part in engine.generate(REQUESTS, SAMPLING) for r in part]
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1.1)
        await engine.update_weights(1, None)
        return found + [r async for part in engine.generate(REQUESTS, SAMPLING) for r in part]

    return sorted(asyncio.run(run()), key=lambda r: (r.version_spans[0].version, r.ordinal, r.index))


@pytest.mark.parametrize("name", WRITTEN_OUT)
def test_both_ways_sample_the_same_with_the_learners_logprobs(name, monkeypatch):
    model = model_of(WRITTEN_OUT[name])
    assert written_out(model)
    ours = sampled(model)
    assert {r.finish_reason for r in ours} == {"stop", "length"} and len({len(r.token_ids) for r in ours}) > 5

    policy = Policy(model, temperature=SAMPLING.temperature, chunk_logits=4096).eval()
    newest = [r for r in ours if r.version_spans[0].version == 1]
    sequences = [TrainingSequence.given(np.arange(4, 5 + r.ordinal), r.token_ids) for r in newest]
    for rollout, learned in zip(newest, policy.score(sequences, 256), strict=True):
        np.testing.assert_allclose(rollout.behavior_logprobs, learned.numpy(), atol=1e-5)

    monkeypatch.setattr(decode, "written_out", lambda _: False)
    for one, other in zip(ours, sampled(model_of(WRITTEN_OUT[name])), strict=True):
        np.testing.assert_array_equal(one.token_ids, other.token_ids)
        np.testing.assert_allclose(one.behavior_logprobs, other.behavior_logprobs, atol=1e-5)


@torch.no_grad()
def steps_of(model, make) -> torch.Tensor:
    """Logits [5, 3, V] of five tokens behind prompts of 2, 3 and 5."""
    lengths, tokens = [2, 3, 5], torch.arange(15).view(3, 5) % 8 + 4
    mask = torch.tensor([[0] * (5 - n) + [1] * n for n in lengths])
    cache = DynamicCache(config=model.config)
    cache.layers = [RoomyLayer() for _ in cache.layers]
    model(input_ids=tokens, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0), past_key_values=cache)
    step = make(model, cache, torch.cat([mask, mask.new_ones(3, 6)], dim=1), 5, 1)
    return torch.stack([step(tokens[:, k], 1 + k) for k in range(5)])


@pytest.mark.parametrize("name", WRITTEN_OUT)
def test_in_bfloat16_it_is_as_near_to_float32_as_the_models_own_forward(name):
    exact = steps_of(model_of(WRITTEN_OUT[name]), model_steps)
    torch.testing.assert_close(steps_of(model_of(WRITTEN_OUT[name]), own_steps), exact, atol=1e-5, rtol=1e-5)
    model = model_of(WRITTEN_OUT[name], torch.bfloat16)
    truth = steps_of(model.to(torch.float32), model_steps)
    model = model.to(torch.bfloat16)
    ours, theirs = ((steps_of(model, make).float() - truth).square().mean().sqrt() for make in (own_steps, model_steps))
    assert 0 < ours < 1.5 * theirs, (ours, theirs)


@pytest.mark.parametrize("name", LEFT_ALONE)
def test_a_model_it_does_not_know_runs_its_own_forward(name):
    assert not written_out(model_of(LEFT_ALONE[name]))
