from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlkit.config.schema import DatasetConfig
from rlkit.data.prompts import load_examples, load_prompts
from rlkit.errors import DataError, TrainingError

Make = Callable[..., DatasetConfig]
TEMPLATE = {"_target_": "rlkit.data.text.Template", "template": "{solution}#{answer}"}
ROWS = [{"question": f"{n}=?", "solution": "x" * n, "answer": n} for n in range(1, 15)]


def test_examples_continue_the_prompts_of_reinforcement_learning(tokenizer: Any) -> None:
    config = DatasetConfig(
        source={"_target_": "rlkit.data.sources.ReasoningGym", "task": "chain_sum", "size": 40},
        prompt="{metadata[expression]:nospace}=",
        completion={"_target_": "recipes.chain_sum.ChainSumTeacher", "error_rate": 0.0},
    )
    examples, _ = load_examples(config, tokenizer, 200, "sft.data")
    prompts = load_prompts(config, tokenizer, "sft.data", True).prompts
    for (row, tokens), prompt in zip(examples, prompts, strict=True):
        assert row.id == prompt.id
        np.testing.assert_array_equal(row.token_ids, prompt.token_ids)
        assert tokens[-1] == tokenizer.eos_token_id
        text = tokenizer.decode(tokens[:-1].tolist())
        assert text.endswith(f"#{prompt.reference}")
        assert tokenizer.eos_token_id not in tokens[:-1]


@given(limit=st.integers(1, 20))
def test_every_row_is_kept_or_counted(tokenizer: Any, limit: int) -> None:
    config = DatasetConfig(source={"_target_": f"{__name__}.Rows"}, completion=TEMPLATE)
    fits = [n for n in range(1, 15) if n + 1 + len(str(n)) + 1 <= limit]
    if not fits:
        with pytest.raises(DataError, match=r"sft\.max_completion_tokens"):
            load_examples(config, tokenizer, limit, "sft.data")
        return
    examples, left_out = load_examples(config, tokenizer, limit, "sft.data")
    assert [len(tokens) for _, tokens in examples] == [n + 2 + len(str(n)) for n in fits]
    assert len(examples) + sum(left_out.values()) == 14


class Rows:
    def rows(self) -> list[dict[str, Any]]:
        return ROWS


def test_example_errors(dataset: Make, tokenizer: Any) -> None:
    for bad in ("", "one <eos> two"):
        config = dataset([*ROWS, {"question": "q", "solution": bad, "answer": ""}])
        config.completion = {"_target_": TEMPLATE["_target_"], "template": "{solution}"}
        with pytest.raises(DataError, match="row '?14"):
            load_examples(config, tokenizer, 100, "sft.data")
    config = dataset([{"question": "q", "solution": "\u00e9", "answer": "1"}], completion=TEMPLATE)
    with pytest.raises(DataError, match=repr("\u00e9")):
        load_examples(config, tokenizer, 100, "sft.data")


class Broken:
    def __call__(self, row: dict[str, Any], index: int) -> str:
        return str(row["absent"])

    def rows(self) -> list[dict[str, Any]]:
        return [ROWS[99]]


def test_a_source_or_teacher_that_raises_is_named(tokenizer: Any) -> None:
    config = DatasetConfig(source={"_target_": f"{__name__}.Rows"}, completion={"_target_": f"{__name__}.Broken"})
    with pytest.raises(TrainingError, match=r"sft.data.completion = 'Broken': .*KeyError: 'absent'.*test_sft"):
        load_examples(config, tokenizer, 100, "sft.data")
    config.source = {"_target_": f"{__name__}.Broken"}
    with pytest.raises(TrainingError, match=r"sft.data.source = 'Broken': .*IndexError"):
        load_prompts(config, tokenizer, "sft.data", False)
