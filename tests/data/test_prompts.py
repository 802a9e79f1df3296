from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlkit.config.schema import DatasetConfig
from rlkit.data.prompts import load_prompts
from rlkit.data.text import render
from rlkit.errors import ConfigError, DataError
from rlkit.learner.model import character_tokenizer

Make = Callable[..., DatasetConfig]
ROWS = [{"question": f"{n} + 1 = ?", "answer": str(n + 1), "key": f"k{n}"} for n in range(12)]
CHATML = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def gym(**settings: Any) -> DatasetConfig:
    source = {"_target_": "rlkit.data.sources.ReasoningGym", "task": "chain_sum", "size": 30}
    return DatasetConfig(source=source, **settings)


def test_plain_prompts_begin_with_bos_and_decode_to_text(dataset: Make, tokenizer: Any) -> None:
    found = load_prompts(dataset(ROWS), tokenizer, "data.train", True)
    assert [p.id for p in found.prompts] == [str(n) for n in range(12)]
    assert not found.left_out
    for row, prompt in zip(ROWS, found.prompts, strict=True):
        assert prompt.text == row["question"] and prompt.reference == row["answer"]
        assert prompt.token_ids[0] == tokenizer.bos_token_id
        assert tokenizer.decode(prompt.token_ids[1:].tolist()) == prompt.text
        assert dict(prompt.metadata) == row


def test_a_tokenizer_that_adds_no_bos_gets_none(dataset: Make, letters: str) -> None:
    bare = character_tokenizer(letters)
    bare._tokenizer.post_processor = None
    found = load_prompts(dataset(ROWS), bare, "data.train", True)
    assert all(bare.decode(p.token_ids.tolist()) == p.text for p in found.prompts)
    assert all(len(p.token_ids) == len(p.text) for p in found.prompts)


def test_nested_fields_and_metadata_of_a_procedural_task(tokenizer: Any) -> None:
    found = load_prompts(gym(prompt="{metadata[expression]:nospace}="), tokenizer, "t", True)
    for prompt in found.prompts:
        assert prompt.text == prompt.metadata["expression"].replace(" ", "") + "="
        assert prompt.metadata["source_dataset"] == "chain_sum"
        assert prompt.metadata["question"].endswith("=")
        assert msgspec.json.decode(msgspec.json.encode(prompt.metadata)) == prompt.metadata


def test_chat_prompts_hold_system_user_and_generation_prompt(dataset: Make, letters: str) -> None:
    chatty = character_tokenizer(letters)
    chatty.chat_template = CHATML
    config = dataset(ROWS, chat=True, system="Sum up.")
    prompt = load_prompts(config, chatty, "data.train", True).prompts[3]
    assert prompt.text == "<|system|>Sum up.\n<|user|>3 + 1 = ?\n<|assistant|>"
    assert chatty.decode(prompt.token_ids.tolist()) == prompt.text
    assert chatty.bos_token_id not in prompt.token_ids  # the template owns every special token


def test_chat_errors(dataset: Make, tokenizer: Any, letters: str) -> None:
    with pytest.raises(DataError, match=r"set model\.chat_template"):
        load_prompts(dataset(ROWS, chat=True), tokenizer, "data.train", True)
    chatty = character_tokenizer(letters)
    chatty.chat_template = "{{ raise_exception('System role not supported') }}"
    with pytest.raises(DataError, match="System role not supported"):
        load_prompts(dataset(ROWS, chat=True, system="x"), chatty, "data.train", True)


@given(limit=st.integers(3, 40))
def test_every_row_is_kept_or_counted(tokenizer: Any, limit: int) -> None:
    config = gym(prompt="{metadata[expression]}", max_prompt_tokens=limit)
    whole = load_prompts(gym(prompt="{metadata[expression]}"), tokenizer, "t", True)
    short = [p.id for p in whole.prompts if len(p.token_ids) <= limit]
    if not short:
        with pytest.raises(DataError, match=r"t\.max_prompt_tokens"):
            load_prompts(config, tokenizer, "t", True)
        return
    found = load_prompts(config, tokenizer, "t", True)
    assert [p.id for p in found.prompts] == short
    assert len(found) + sum(found.left_out.values()) == len(whole)


def test_limit_takes_the_first_rows(dataset: Make, tokenizer: Any) -> None:
    found = load_prompts(dataset(ROWS, limit=5), tokenizer, "t", True)
    assert [p.reference for p in found.prompts] == ["1", "2", "3", "4", "5"]
    assert len(load_prompts(dataset(ROWS, limit=500), tokenizer, "t", True)) == 12
    for config in (dataset(ROWS, limit=0), dataset([])):
        with pytest.raises(DataError, match="empty"):
            load_prompts(config, tokenizer, "t", True)


def test_a_missing_field_names_row_and_existing_fields(dataset: Make, tokenizer: Any) -> None:
    rows = [*ROWS, {"answer": "1", "metadata": {"inner": "x"}}]
    with pytest.raises(DataError) as caught:
        load_prompts(dataset(rows), tokenizer, "data.train", True)
    for words in ("data.train.prompt", "row 12", "'question'", "answer", "metadata[inner]"):
        assert words in str(caught.value)


@pytest.mark.parametrize("template", ["\\boxed{}", "{0}", "{question", "{question.x}", "{question[a]}", "{question:d}"])
def test_bad_templates_say_how_to_mend_them(dataset: Make, tokenizer: Any, template: str) -> None:
    with pytest.raises(DataError, match=r"prompt.*[\s\S]*literal braces twice"):
        load_prompts(dataset(ROWS, prompt=template), tokenizer, "data.train", True)


@given(st.dictionaries(st.from_regex(r"[a-z]+", fullmatch=True), st.text(), min_size=1))
def test_templates_render_any_value_verbatim(row: dict[str, str]) -> None:
    text = "{{" + "|".join("{" + name + "}" for name in row) + "}}"
    blank = not "".join(row.values()).strip()
    assert render(text, row, 0, "k") == (None if blank else "{" + "|".join(row.values()) + "}")


@pytest.mark.parametrize("answer", ["", None])
def test_missing_references(dataset: Make, tokenizer: Any, answer: str | None) -> None:
    rows = [*ROWS, {"question": "1 = ?", "answer": answer, "key": "last"}]
    config = dataset(rows)
    with pytest.raises(DataError, match=f"row '{len(ROWS)}' has no reference"):
        load_prompts(config, tokenizer, "data.train", True)
    assert load_prompts(config, tokenizer, "data.train", False).prompts[-1].reference is None
    config.reference = None
    assert load_prompts(config, tokenizer, "data.train", False).prompts[0].reference is None
    with pytest.raises(DataError, match=r"data\.train\.reference"):
        load_prompts(config, tokenizer, "data.train", True)


def test_reference_pattern_takes_the_final_answer(dataset: Make, tokenizer: Any) -> None:
    rows = [{"question": "q", "answer": "3 times 4 = <<3*4=12>>12\n#### 12"}]
    for pattern in (r"####\s*(.+)", r"(?<=#### ).*"):
        config = dataset(rows, reference_pattern=pattern)
        assert load_prompts(config, tokenizer, "t", True).prompts[0].reference == "12"
    rows.append({"question": "q", "answer": "no mark"})
    with pytest.raises(DataError, match=r"t\.reference_pattern.*row '1'.*no mark"):
        load_prompts(dataset(rows, reference_pattern="#### (.*)"), tokenizer, "t", True)
    with pytest.raises(ConfigError, match="not a regular expression"):
        load_prompts(dataset(rows, reference_pattern="("), tokenizer, "t", True)


def test_ids_are_row_numbers(dataset: Make, tokenizer: Any) -> None:
    found = load_prompts(dataset(ROWS), tokenizer, "t", True)
    assert [p.id for p in found.prompts] == [str(number) for number in range(len(ROWS))]


@pytest.mark.parametrize("question", ["", None])
def test_an_empty_prompt_is_an_error(dataset: Make, tokenizer: Any, question: str | None) -> None:
    with pytest.raises(DataError, match=r"row 0 .*empty prompt"):
        load_prompts(dataset([{"question": question, "answer": "1"}]), tokenizer, "t", True)


@pytest.mark.parametrize("row", [{"question": ""}, {"question": " "}, {"question": None}])
def test_a_prompt_without_its_field_is_an_error_too(dataset: Make, tokenizer: Any, row: dict[str, Any]) -> None:
    rows = [{"question": "1", "answer": "1"}, {"answer": "1", **row}]
    with pytest.raises(DataError, match=r"row 1 .*empty prompt"):
        load_prompts(dataset(rows, prompt="1+{question}+1"), tokenizer, "t", True)
    found = load_prompts(dataset(rows[:1], prompt="1+1"), tokenizer, "t", True)
    assert [prompt.text for prompt in found.prompts] == ["1+1"]


def test_unknown_characters_are_named(dataset: Make, tokenizer: Any) -> None:
    rows = [*ROWS, {"question": "2 \u00d7 3 \u00f7 1", "answer": "6"}]
    with pytest.raises(DataError) as caught:
        load_prompts(dataset(rows), tokenizer, "t", True)
    for words in ("'12'", repr("\u00d7"), repr("\u00f7"), "model.alphabet"):
        assert words in str(caught.value)
    with pytest.raises(DataError, match="surrogate"):
        load_prompts(dataset([{"question": "\ud800", "answer": "1"}]), tokenizer, "t", True)


def test_shared_prompts_between_sets_are_counted(dataset: Make, tokenizer: Any) -> None:
    train = load_prompts(dataset(ROWS[:8]), tokenizer, "t", True)
    held_out = load_prompts(dataset(ROWS[6:]), tokenizer, "e", True)
    assert train.shared_with(held_out) == 2 and held_out.shared_with(train) == 2


def test_a_field_that_is_not_json_is_named(tokenizer: Any) -> None:
    source = {"_target_": f"{__name__}.ObjectRows"}
    with pytest.raises(DataError, match=r"row '0'.*object"):
        load_prompts(DatasetConfig(source=source), tokenizer, "t", True)


class ObjectRows:
    def rows(self) -> list[dict[str, Any]]:
        return [{"question": "q", "answer": "1", "image": object()}]
