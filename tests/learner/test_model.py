from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from rlkit.config.schema import ModelConfig
from rlkit.errors import ConfigError
from rlkit.learner.model import load_model, load_tokenizer, resolve_dtype

ALPHABET = "0123456789+-=;# .\n"
TINY = {
    "model_type": "llama",
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "tie_word_embeddings": True,
}


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return load_tokenizer(ModelConfig(alphabet=ALPHABET))


def make(tokenizer: Any, changes: Any = None, seed: int = 0, dtype: torch.dtype = torch.float32) -> Any:
    config = ModelConfig(architecture={**TINY, **(changes or {})}, alphabet=ALPHABET)
    return load_model(config, tokenizer, dtype, seed)


@pytest.fixture
def saved(tmp_path: Path, tokenizer: Any) -> Path:
    make(tokenizer).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@settings(deadline=None)
@given(st.text(alphabet=ALPHABET, min_size=1))
def test_character_tokenizer_is_exact(tokenizer: Any, text: str) -> None:
    ids = tokenizer(text, add_special_tokens=False).input_ids
    assert ids == [4 + ALPHABET.index(letter) for letter in text]
    assert tokenizer.decode(ids) == text
    assert tokenizer(text).input_ids == [tokenizer.bos_token_id, *ids]
    ended = [*ids, tokenizer.eos_token_id]
    assert tokenizer.decode(ended, skip_special_tokens=True) == text


def test_character_tokenizer_survives_saving(tokenizer: Any, tmp_path: Path) -> None:
    assert len(tokenizer) == len(ALPHABET) + 4
    special = [tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id]
    assert special == [0, 1, 2] and tokenizer.unk_token_id == 3
    tokenizer.save_pretrained(tmp_path)
    back = AutoTokenizer.from_pretrained(tmp_path)
    text = "1 + 2.\n= 3 #<eos>?"
    assert back(text).input_ids == tokenizer(text).input_ids
    assert back.get_vocab() == tokenizer.get_vocab()
    assert back.decode(back(text).input_ids) == tokenizer.decode(tokenizer(text).input_ids)
    assert back.pad_token_id == 0 and back.eos_token_id == 2


def test_tokenizer_settings(saved: Path, tmp_path: Path, tokenizer: Any) -> None:
    template = "{% for m in messages %}{{ m.content }}{% endfor %}="
    loaded = load_tokenizer(ModelConfig(path=str(saved), chat_template=template))
    message = [{"role": "user", "content": "1+1"}]
    assert loaded.apply_chat_template(message, tokenize=False) == "1+1="
    settings = json.loads((saved / "tokenizer_config.json").read_text())
    del settings["pad_token"]
    (saved / "tokenizer_config.json").write_text(json.dumps(settings))
    padless = load_tokenizer(ModelConfig(path="elsewhere", tokenizer=str(saved)))
    assert padless.pad_token_id == padless.eos_token_id == tokenizer.eos_token_id
    del settings["eos_token"]
    (saved / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(ConfigError, match="no end-of-sequence token"):
        load_tokenizer(ModelConfig(path=str(saved)))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"alphabet": "1231"}, "more than once: '1'"),
        ({"alphabet": ""}, "empty"),
        ({"tokenizer": "./nowhere"}, "no such folder"),
        ({"path": "a/b/c"}, "model.path.*no such folder"),
    ],
)
def test_tokenizer_errors(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        load_tokenizer(ModelConfig(**settings))


def test_initial_weights_follow_the_seed_and_leave_no_trace(tokenizer: Any) -> None:
    torch.manual_seed(99)
    before = torch.get_rng_state()
    first = make(tokenizer, seed=5).state_dict()
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(7)
    again, other = make(tokenizer, seed=5).state_dict(), make(tokenizer, seed=6).state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


def test_weights_are_drawn_before_they_are_cast(tokenizer: Any) -> None:
    full, half = make(tokenizer), make(tokenizer, dtype=torch.bfloat16)
    for one, two in zip(full.parameters(), half.parameters(), strict=True):
        assert two.dtype == torch.bfloat16
        assert torch.equal(one.to(torch.bfloat16), two)
    for one, two in zip(full.buffers(), half.buffers(), strict=True):
        assert torch.equal(one, two) and two.dtype == one.dtype  # rotary frequencies stay exact
    assert half.dtype == torch.bfloat16


def test_new_model_takes_its_vocabulary_from_the_tokenizer(tokenizer: Any) -> None:
    model = make(tokenizer)
    assert model.config.vocab_size == len(tokenizer) == model.get_input_embeddings().num_embeddings
    assert model.config.eos_token_id == model.generation_config.eos_token_id == 2
    assert model.config.pad_token_id == 0 and model.config.bos_token_id == 1
    assert not model.training
    ids = torch.tensor([tokenizer("1+2=").input_ids])
    with torch.no_grad():
        assert model(ids).logits.shape == (1, 5, len(tokenizer))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model_type": "lama"}, r"model_type = 'lama'.*Did you mean 'llama'"),
        ({"model_type": None}, "no such model type"),
        ({"hidden_sizes": 8}, r"hidden_sizes = 8.*Did you mean 'hidden_size'"),
        ({"vocab_size": 8}, "comes from the tokenizer"),
        ({"eos_token_id": 8}, "comes from the tokenizer"),
        ({"dtype": "float32"}, r"model\.dtype"),
        ({"num_attention_heads": 3}, "multiple of the number of attention heads"),
        ({"hidden_size": "many"}, "hidden_size"),
        ({"hidden_act": "relux"}, "relux"),
        ({"attention_dropout": 0.1}, "dropout off"),
    ],
)
def test_bad_architectures_are_explained(tokenizer: Any, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        make(tokenizer, changes)


def test_other_architectures_of_the_library_work(tokenizer: Any) -> None:
    gpt2 = {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 32}
    model = load_model(ModelConfig(architecture={"model_type": "gpt2", **gpt2}), tokenizer, torch.float32, 0)
    # GPT-2's default dropout is 0.1: two passes in training mode must agree all the same.
    model.train()
    ids = torch.tensor([tokenizer("1+2=").input_ids])
    assert torch.equal(model(ids).logits, model(ids).logits)
    with pytest.raises(ConfigError, match=r"model\.architecture"):
        load_model(ModelConfig(architecture={"model_type": "vit"}), tokenizer, torch.float32, 0)


def test_saved_model_loads_the_same_weights(saved: Path, tokenizer: Any) -> None:
    loaded = load_model(ModelConfig(path=str(saved)), tokenizer, torch.float32, seed=3)
    expected = make(tokenizer).state_dict()
    found = loaded.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert not loaded.training and loaded.config._attn_implementation == "sdpa"


def test_loading_turns_dropout_off(saved: Path, tokenizer: Any) -> None:
    settings = json.loads((saved / "config.json").read_text())
    settings["attention_dropout"] = 0.5
    (saved / "config.json").write_text(json.dumps(settings))
    model = load_model(ModelConfig(path=str(saved)), tokenizer, torch.float32, 0).train()
    ids = torch.tensor([tokenizer("1+2=").input_ids])
    assert torch.equal(model(ids).logits, model(ids).logits)


def test_gradient_checkpointing_changes_no_gradient(tokenizer: Any) -> None:
    ids = torch.tensor([tokenizer("1+2=3").input_ids])
    gradients = []
    for switch in (False, True):
        config = ModelConfig(architecture=TINY, gradient_checkpointing=switch)
        model = load_model(config, tokenizer, torch.float32, 0).train()
        assert model.is_gradient_checkpointing is switch
        model(ids, labels=ids).loss.backward()
        gradients.append([p.grad for p in model.parameters()])
    for one, two in zip(*gradients, strict=True):
        torch.testing.assert_close(one, two)


def test_missing_weights_are_an_error_not_random_numbers(saved: Path, tokenizer: Any) -> None:
    weights = load_file(saved / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, saved / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=r"1 weights are missing.*layers\.1\.mlp\.up_proj"):
        load_model(ModelConfig(path=str(saved)), tokenizer, torch.float32, 0)


def test_pickled_weights_and_torn_files_are_refused(saved: Path, tokenizer: Any) -> None:
    weights = saved / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ConfigError, match=r"model\.path.*cannot be loaded"):
        load_model(ModelConfig(path=str(saved)), tokenizer, torch.float32, 0)
    torch.save(load_file_from(whole), saved / "pytorch_model.bin")
    weights.unlink()
    with pytest.raises(ConfigError, match="no pickled weights"):
        load_model(ModelConfig(path=str(saved)), tokenizer, torch.float32, 0)


def load_file_from(data: bytes) -> dict[str, torch.Tensor]:
    from safetensors.torch import load

    return load(data)


def test_a_tokenizer_larger_than_the_model_is_refused(saved: Path) -> None:
    larger = load_tokenizer(ModelConfig(alphabet=ALPHABET + "abc"))
    with pytest.raises(ConfigError, match=r"25 tokens, the model embeds 22"):
        load_model(ModelConfig(path=str(saved)), larger, torch.float32, 0)


def test_paths_and_hub_names_that_lead_nowhere(saved: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(**settings: Any) -> None:
        load_model(ModelConfig(**settings), tokenizer, torch.float32, 0)

    with pytest.raises(ConfigError, match="Did you mean 'model'"):
        load(path=str(saved.parent / "modle"))
    with pytest.raises(ConfigError, match="this is a file"):
        load(path=str(saved / "config.json"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ConfigError, match=r"nobody/nothing.*[\s\S]*offline: HF_HUB_OFFLINE=1"):
        load(path="nobody/nothing")
    with pytest.raises(ConfigError, match=r"model\.tokenizer.*nobody/nothing"):
        load_tokenizer(ModelConfig(tokenizer="nobody/nothing"))


def test_dtypes() -> None:
    assert resolve_dtype("auto", torch.device("cpu")) is torch.float32
    assert resolve_dtype("bfloat16", torch.device("cpu")) is torch.bfloat16
