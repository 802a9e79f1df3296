"""The forward pass of one new token a row, with all that is the same for a whole stretch of tokens made once.

Most of a token's time in a small model goes to the Python around its products: masks, rotary tables, module calls. For
the Llama family on a CPU the layers are therefore written out here, on the modules and weights of the model itself; any
other model runs its own forward. Both give the same logits up to rounding.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import rms_norm
from transformers import PreTrainedModel

# RMS norms before attention and MLP, rotary halves, a gated MLP; biases and norms of queries and keys where they exist.
FAMILY = {"llama", "mistral", "qwen2", "qwen3"}
STEADY_ROPE = {"default", "linear", "llama3", "yarn"}  # the others' angles depend on how long the text is by now

Step = Callable[[Tensor, int], Tensor]  # the last tokens [B] and how many were sampled with them -> logits [B, V]


def steps(model: PreTrainedModel, cache: Any, mask: Tensor, width: int, done: int) -> Step:
    """The steps of a stretch, for `done` sampled tokens or more.

    cache: of all tokens but the last ones; mask [B, width + new tokens]: prompts, left padded, then ones.
    """
    return (own_steps if written_out(model) else model_steps)(model, cache, mask, width, done)


def written_out(model: PreTrainedModel) -> bool:
    """Whether `own_steps` knows the model: its family, its rotary angles, no window, on a CPU."""
    config: Any = model.config
    rope = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    windowed = any(kind != "full_attention" for kind in getattr(config, "layer_types", None) or ())
    windowed |= config.model_type == "mistral" and config.sliding_window is not None
    return config.model_type in FAMILY and rope in STEADY_ROPE and not windowed and model.device.type == "cpu"


def model_steps(model: PreTrainedModel, cache: Any, mask: Tensor, width: int, _: int) -> Step:
    """By the model's own forward."""
    lengths = mask[:, :width].sum(dim=1, keepdim=True)

    def step(tokens: Tensor, sampled: int) -> Tensor:
        output = model(
            input_ids=tokens[:, None], attention_mask=mask[:, : width + sampled], position_ids=lengths + sampled - 1,
            past_key_values=cache, use_cache=True, logits_to_keep=1,
        )  # fmt: skip
        return cast(Tensor, output.logits[:, -1])

    return step


def own_steps(model: PreTrainedModel, cache: Any, mask: Tensor, width: int, done: int) -> Step:
    """By the layers written out."""
    decoder: Any = model.get_decoder()
    embed, head, rows = decoder.embed_tokens, cast(nn.Module, model.get_output_embeddings()), len(mask)
    places = mask[:, :width].sum(dim=1, keepdim=True) + torch.arange(done, mask.shape[1] - width + 1) - 1
    cos, sin = decoder.rotary_emb(embed.weight, position_ids=places)  # [B, steps, D]
    half = cos.shape[-1] // 2
    sin = torch.cat([-sin[..., :half], sin[..., half:]], dim=-1)
    heads = model.config.num_key_value_heads
    bias = torch.zeros(mask.shape, dtype=cos.dtype).masked_fill_(mask == 0, -torch.inf)
    bias = bias.repeat_interleave(heads, dim=0)[:, None]  # [B * heads, 1, tokens]

    def step(tokens: Tensor, sampled: int) -> Tensor:
        turn = partial(rotated, cos=cos[:, sampled - done, None], sin=sin[:, sampled - done, None], half=half)
        seen = bias[..., : width + sampled]
        x = embed(tokens)
        for layer, layer_cache in zip(decoder.layers, cache.layers, strict=True):
            attention, mlp = layer.self_attn, layer.mlp
            normed = normalised(layer.input_layernorm, x)
            shape = rows, -1, attention.head_dim
            query, key = attention.q_proj(normed).view(shape), attention.k_proj(normed).view(shape)
            if hasattr(attention, "q_norm"):
                query, key = normalised(attention.q_norm, query), normalised(attention.k_norm, key)
            value = attention.v_proj(normed).view(shape)
            keys, values = layer_cache.update(turn(key)[:, :, None], value[:, :, None])
            query = turn(query).view(rows * heads, -1, attention.head_dim)
            scores = torch.baddbmm(seen, query, keys.flatten(0, 1).transpose(1, 2), alpha=attention.scaling)
            mixed = torch.bmm(scores.softmax(dim=-1), values.flatten(0, 1)).view(rows, -1)
            x = attention.o_proj(mixed).add_(x)
            normed = normalised(layer.post_attention_layernorm, x)
            x = mlp.down_proj(mlp.act_fn(mlp.gate_proj(normed)).mul_(mlp.up_proj(normed))).add_(x)
        return cast(Tensor, head(normalised(decoder.norm, x)))

    return step


def rotated(x: Tensor, cos: Tensor, sin: Tensor, half: int) -> Tensor:
    """x [B, heads, D] turned by its row's angles; the first half of sin [B, 1, D] has its sign changed."""
    return torch.addcmul(x * cos, x.roll(half, dims=-1), sin)


def normalised(norm: Any, x: Tensor) -> Tensor:
    """An RMS norm of transformers without the Python of its forward."""
    return rms_norm(x, norm.weight.shape, norm.weight, norm.variance_epsilon)
