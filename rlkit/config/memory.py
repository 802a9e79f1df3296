"""How much memory a configuration will need, roughly, without allocating any weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rlkit.config.components import build
from rlkit.config.parts import datasets, needs_reference
from rlkit.config.schema import Config, ModelConfig
from rlkit.errors import ConfigError, nearest

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

SPECIAL_TOKENS = 4  # of a character tokenizer: pad, bos, eos, unk


@dataclass(frozen=True, slots=True)
class Part:
    """One consumer of memory."""

    name: str
    bytes: int
    how: str


@dataclass(frozen=True, slots=True)
class Shape:
    """What the estimate needs to know of an architecture."""

    parameters: int
    layers: int
    hidden: int
    intermediate: int
    key_value_width: int  # key/value heads * head size
    vocabulary: int


def estimate(config: Config) -> list[Part]:
    """Parts of the peak memory of one learner process with the embedded engine.

    Weights, gradients and optimiser state are exact; activations count the tensors a transformer
    block with a gated MLP and fused attention keeps for its backward pass, and are good to about a
    factor of two. Framework overhead is not in it. Raises ConfigError where the architecture is
    not to be had.
    """
    shape = model_shape(config.model)
    weight_bytes = 2 if _bfloat16(config.model.dtype, config) else 4
    compute_bytes = 2 if weight_bytes == 2 or _autocast(config) else 4
    longest = max(d.max_prompt_tokens for d in datasets(config).values())
    longest += config.rollout.max_completion_tokens
    tokens = max(config.learner.max_tokens_per_microbatch, longest)
    # Never more than the step has: tiny runs stay far below the limit.
    sequences = config.prompts_per_step * config.samples_per_prompt
    tokens = min(tokens, sequences // config.learner.updates_per_step * longest)
    block = 8 * shape.hidden + 2 * shape.key_value_width + 4 * shape.intermediate
    saved = shape.layers * block
    if config.model.gradient_checkpointing:
        saved = shape.layers * shape.hidden + block
    chunk = min(config.learner.logprob_chunk_tokens, tokens)
    engine = build(config.rollout.engine, key="rollout.engine")
    engine_rows = min(
        getattr(engine, "max_batch_samples", sequences),
        max(sequences, config.evaluation.batch_samples if config.data.eval else 0),
    )
    cache = 2 * shape.layers * shape.key_value_width * longest * engine_rows
    parts = [
        Part("weights", shape.parameters * weight_bytes, f"{shape.parameters:,} parameters"),
        Part("gradients", shape.parameters * weight_bytes, "as the weights"),
        Part("AdamW moments", 2 * shape.parameters * weight_bytes, "two, as the weights"),
        Part("activations of a micro-batch", tokens * saved * compute_bytes, f"{tokens:,} tokens"),
        Part(
            "log-prob chunk",
            2 * chunk * shape.vocabulary * 4,
            f"logits and their gradient, {chunk:,} tokens x {shape.vocabulary:,} words, float32",
        ),
        Part(
            "key-value cache of the embedded engine",
            cache * weight_bytes,
            f"{engine_rows:,} sequences of {longest:,} tokens",
        ),
    ]
    if _autocast(config) and weight_bytes == 4:
        parts.append(Part("bfloat16 copy of the weights", 2 * shape.parameters, "autocast's cache"))
    if needs_reference(config):
        parts.append(Part("reference model", shape.parameters * weight_bytes, "algorithm.kl"))
    return parts


def model_shape(model: ModelConfig) -> Shape:
    """Sizes of the architecture; the model is made on the meta device, where it takes no memory."""
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM

    try:
        settings = _architecture(model)
        with init_empty_weights(include_buffers=True):
            empty = AutoModelForCausalLM.from_config(settings, attn_implementation=model.attention)
    except ConfigError:
        raise
    # Architectures check their settings by any kind of error, KeyError to RuntimeError.
    except Exception as error:
        raise ConfigError(
            f"the model cannot be made: {type(error).__name__}: {error}",
            key="model.architecture" if model.path is None else "model.path",
            value=model.architecture or model.path,
        ) from error
    text = settings.get_text_config()
    heads = text.num_attention_heads
    head_size = getattr(text, "head_dim", None) or text.hidden_size // heads
    key_value_heads = getattr(text, "num_key_value_heads", None) or heads
    intermediate = getattr(text, "intermediate_size", None) or 4 * text.hidden_size
    return Shape(
        parameters=sum(p.numel() for p in empty.parameters()),
        layers=text.num_hidden_layers,
        hidden=text.hidden_size,
        intermediate=intermediate,
        key_value_width=key_value_heads * head_size,
        vocabulary=text.vocab_size,
    )


def _architecture(model: ModelConfig) -> PreTrainedConfig:
    from transformers import CONFIG_MAPPING, AutoConfig, AutoTokenizer

    if model.architecture is None:
        assert model.path is not None
        found: PreTrainedConfig = _fetched(AutoConfig, model.path, "model.path")
        return found
    settings: dict[str, Any] = dict(model.architecture)
    model_type = settings.pop("model_type")
    if model_type not in CONFIG_MAPPING:
        raise ConfigError(
            f"transformers has no such model type.{nearest(str(model_type), CONFIG_MAPPING)}",
            key="model.architecture.model_type",
            value=model_type,
        )
    if model.alphabet is not None:
        settings["vocab_size"] = len(model.alphabet) + SPECIAL_TOKENS
    else:
        assert model.tokenizer is not None
        tokenizer = _fetched(AutoTokenizer, model.tokenizer, "model.tokenizer")
        settings["vocab_size"] = len(tokenizer)
    return AutoConfig.for_model(model_type, **settings)


def _fetched(kind: Any, name: str, key: str) -> Any:
    """From a folder, the local cache or the hub."""
    try:
        return kind.from_pretrained(name, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"its configuration is not to be had ({type(error).__name__}: {str(error).splitlines()[0]})",
            key=key,
            value=name,
            fix="give a local folder, or download it where there is a network",
        ) from error


def _on_cuda(config: Config) -> bool:
    import torch

    return config.learner.device != "cpu" and torch.cuda.is_available()


def _bfloat16(dtype: str, config: Config) -> bool:
    return dtype == "bfloat16" or (dtype == "auto" and _on_cuda(config))


def _autocast(config: Config) -> bool:
    setting = config.learner.mixed_precision
    return setting == "bf16" or (setting == "auto" and _on_cuda(config))
