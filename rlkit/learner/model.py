"""Loading or creating the policy and its tokenizer, without side effects on global generators."""

import contextlib
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from accelerate import init_empty_weights
from safetensors import SafetensorError
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from rlkit.config.schema import ModelConfig
from rlkit.errors import ConfigError, nearest

_SPECIAL = {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<unk>"}
_FROM_TOKENIZER = ("vocab_size", "pad_token_id", "bos_token_id", "eos_token_id")
_FROM_MODEL_CONFIG = {"dtype": "model.dtype", "attn_implementation": "model.attention"}
_CAUSAL_LM: Any = AutoModelForCausalLM  # the stubs know neither from_config's settings nor output_loading_info


def load_tokenizer(config: ModelConfig) -> PreTrainedTokenizerBase:
    """The policy's tokenizer: a character tokenizer of `alphabet`, or a pretrained one.

    `chat_template` replaces the tokenizer's own. A tokenizer without a padding token gets its end-of-sequence token for
    it: masks are made from lengths, never from token ids. Raises `ConfigError` when it cannot be made or loaded.
    """
    name, key = config.tokenizer or config.path, "model.path" if config.tokenizer is None else "model.tokenizer"
    if config.alphabet is not None:
        tokenizer = character_tokenizer(config.alphabet)
    else:
        assert name is not None  # config.verify
        with _loading("a tokenizer", name, key) as folder:
            tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    if config.chat_template is not None:
        tokenizer.chat_template = config.chat_template
    if tokenizer.eos_token_id is None:
        problem = "it has no end-of-sequence token: completions would never end"
        raise ConfigError(problem, key="model.tokenizer", value=name)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def character_tokenizer(alphabet: str) -> PreTrainedTokenizerBase:
    """A tokenizer with a token for each character of `alphabet`, in that order, from id 4 on.

    Ids 0 to 3 are <pad>, <bos>, <eos> and <unk>. Text begins with <bos>; decoding joins characters without spaces.
    """
    repeated = sorted({letter for letter in alphabet if alphabet.count(letter) > 1})
    if not alphabet or repeated:
        problem = f"characters more than once: {', '.join(map(repr, repeated))}" if repeated else "empty"
        raise ConfigError(problem, key="model.alphabet", value=alphabet, expected="every character once")
    tokens = [*_SPECIAL.values(), *alphabet]
    inner = Tokenizer(models.WordLevel({token: index for index, token in enumerate(tokens)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    inner.decoder = decoders.Fuse()
    inner.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A $B", special_tokens=[("<bos>", tokens.index("<bos>"))]
    )
    fast: Any = transformers.PreTrainedTokenizerFast
    made: PreTrainedTokenizerBase = fast(tokenizer_object=inner, clean_up_tokenization_spaces=False, **_SPECIAL)
    return made


def load_model(
    config: ModelConfig, tokenizer: PreTrainedTokenizerBase, dtype: torch.dtype, seed: int
) -> PreTrainedModel:
    """The policy on the CPU, in `dtype`, in eval mode; every dropout probability is 0, for ratios are of one network.

    From `path` only safetensors are read, no remote code runs, and weights the file lacks are an error. From
    `architecture` the weights are a function of the settings and `seed` alone (in float32, then cast). `ConfigError`.
    """
    name = config.path
    model = _new_model(config, tokenizer, dtype, seed) if name is None else _pretrained(name, config.attention, dtype)
    if len(tokenizer) > (rows := len(cast(Any, model.get_input_embeddings()).weight)):
        problem = f"the tokenizer has {len(tokenizer)} tokens, the model embeds {rows}"
        value, fix = config.tokenizer or config.path, "use the model's own tokenizer"
        raise ConfigError(problem, key="model.tokenizer", value=value, fix=fix)
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train(False)
    return model


def empty_model(config: ModelConfig) -> PreTrainedModel:
    """The policy's architecture on the meta device, where it takes no memory. Raises `ConfigError`."""
    with init_empty_weights(include_buffers=True):
        if config.path is None:
            return _new_model(config, load_tokenizer(config), torch.float32, seed=0)
        with _loading("a model", config.path, "model.path") as folder:
            settings = AutoConfig.from_pretrained(folder, trust_remote_code=False)
            return cast(PreTrainedModel, _CAUSAL_LM.from_config(settings, attn_implementation=config.attention))


def resolve_dtype(name: str, device: torch.device) -> torch.dtype:
    """`float32`, `bfloat16`, or `auto`: bfloat16 where the device computes in it, else float32."""
    fast = name == "auto" and device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if fast or name == "bfloat16" else torch.float32


def _pretrained(name: str, attention: str, dtype: torch.dtype) -> PreTrainedModel:
    with _loading("a model in safetensors", name, "model.path") as folder:
        settings = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        _disable_dropout(settings)
        model, report = _CAUSAL_LM.from_pretrained(
            folder, config=settings, dtype=dtype, attn_implementation=attention, use_safetensors=True,
            trust_remote_code=False, output_loading_info=True,
        )  # fmt: skip
    absent = sorted(map(str, [*report["missing_keys"], *report["mismatched_keys"]]))
    if absent:
        problem = f"{len(absent)} weights are missing or of another shape, the first: {', '.join(absent[:3])}"
        expected = "all weights of the architecture that its config.json names"
        raise ConfigError(problem, key="model.path", value=name, expected=expected)
    return cast(PreTrainedModel, model)


def _new_model(
    config: ModelConfig, tokenizer: PreTrainedTokenizerBase, dtype: torch.dtype, seed: int
) -> PreTrainedModel:
    architecture = dict(config.architecture or {})
    _check_architecture(architecture)
    filled = {name: getattr(tokenizer, name) for name in _FROM_TOKENIZER} | {"vocab_size": len(tokenizer)}
    # Only the CPU generator is seeded and put back: torch.manual_seed would reseed CUDA's too.
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        try:
            settings = AutoConfig.for_model(**architecture, **filled)
            _disable_dropout(settings)
            given = {"dtype": torch.float32, "attn_implementation": config.attention}
            model: PreTrainedModel = _CAUSAL_LM.from_config(settings, **given)
        # Architectures check their settings by any kind of error, KeyError to RuntimeError.
        except Exception as error:
            problem = f"the model cannot be made: {type(error).__name__}: {error}"
            expected = "settings that fit together and a model with a causal language-model head"
            raise ConfigError(problem, key="model.architecture", value=architecture, expected=expected) from error
    # Parameters only: a cast of the buffers would round rotary frequencies.
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    model.config.dtype = dtype
    return model


def _check_architecture(architecture: dict[str, Any]) -> None:
    model_type, type_key = architecture.get("model_type"), "model.architecture.model_type"
    types = transformers.CONFIG_MAPPING
    if model_type not in types:
        problem = f"transformers has no such model type.{nearest(str(model_type), types)}"
        raise ConfigError(problem, key=type_key, value=model_type, expected="a model type, e.g. qwen3 or llama")
    kind = types[str(model_type)]
    known = {"model_type", *kind.__dataclass_fields__, *kind.attribute_map}
    if "vocab_size" not in known:
        raise ConfigError("not a plain language model: its config has no vocab_size", key=type_key, value=model_type)
    for name, value in architecture.items():
        refused = partial(ConfigError, key=f"model.architecture.{name}", value=value)
        if name in _FROM_TOKENIZER:
            raise refused("this comes from the tokenizer", fix="drop it")
        if name in _FROM_MODEL_CONFIG:
            raise refused("this has a key of its own", fix=f"set {_FROM_MODEL_CONFIG[name]}")
        if name not in known:
            raise refused(f"{model_type} has no such setting.{nearest(name, known)}")
        if "dropout" in name and value:
            raise refused("importance ratios need dropout off", fix="set it to 0")


def _disable_dropout(settings: transformers.PreTrainedConfig) -> None:
    """Set every dropout probability of a config to 0, whatever the architecture calls it."""
    for name, value in vars(settings).items():
        if name.endswith(("dropout", "_pdrop")) and isinstance(value, int | float) and value:
            setattr(settings, name, 0.0)


@contextlib.contextmanager
def _loading(what: str, name: str, key: str) -> Iterator[str]:
    """Yield an existing folder, expanded, or a name that can be one on the hub; explain what goes wrong there."""
    path = Path(name).expanduser()
    if path.is_file():
        raise ConfigError("this is a file", key=key, value=name, expected="a folder or hub name")
    if not path.is_dir() and (name.startswith((".", "/", "~")) or name.count("/") > 1):
        siblings = [item.name for item in path.parent.iterdir()] if path.parent.is_dir() else []
        expected = f"a folder; relative paths start at {Path.cwd()}"
        raise ConfigError(f"no such folder.{nearest(path.name, siblings)}", key=key, value=name, expected=expected)
    try:
        yield str(path) if path.is_dir() else name
    except (OSError, ValueError, KeyError, ImportError, SafetensorError) as error:
        where = "this folder" if path.is_dir() else "the hub, and there is no such folder"
        problem = f"{what} cannot be loaded from {where}: {type(error).__name__}: {error}"
        expected = f"{what} (no pickled weights, no remote code) in a folder, or a hub name in reach or in the cache"
        fix = None if path.is_dir() else "offline: HF_HUB_OFFLINE=1 goes to the cache at once; or give a folder"
        raise ConfigError(problem, key=key, value=name, expected=expected, fix=fix) from error
