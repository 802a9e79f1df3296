"""Supervised examples: a prompt and its target completion."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from rlkit.config.components import build
from rlkit.config.schema import DatasetConfig
from rlkit.data.prompts import RenderedRow, render_rows
from rlkit.data.text import encode
from rlkit.errors import DataError
from rlkit.types import IntArray

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def load_examples(
    config: DatasetConfig, tokenizer: PreTrainedTokenizerBase, max_completion_tokens: int, key: str
) -> tuple[list[tuple[RenderedRow, IntArray]], dict[str, int]]:
    """Rows that are short enough with their completion's tokens, the last one eos; counts of the others by reason.

    The teacher `config.completion` writes a row's completion from (row, row number). `DataError` as `load_prompts`, and
    for a completion that is empty or has an end-of-sequence token inside, or when every one is too long.
    """
    assert config.completion is not None and tokenizer.eos_token_id is not None  # verify, load_tokenizer
    eos = tokenizer.eos_token_id
    teacher = build(config.completion, key=f"{key}.completion")
    rows, left_out = render_rows(config, tokenizer, key)
    texts = [teacher(item.row, item.number) for item in rows]
    encoded, examples = (
        encode(texts, tokenizer, [item.id for item in rows], f"{key}.completion"),
        list[tuple[RenderedRow, IntArray]](),
    )
    for item, text, tokens in zip(rows, texts, encoded, strict=True):
        if not tokens or eos in tokens:
            problem = (
                f"the completion of row {item.id!r} is empty or has {tokenizer.eos_token!r} inside: {text[:200]!r}"
            )
            expected = "text; the end-of-sequence token is added behind it"
            raise DataError(problem, key=f"{key}.completion", value=config.completion, expected=expected)
        if len(tokens) < max_completion_tokens:
            examples.append((item, np.array([*tokens, eos])))
    if not examples:
        problem = f"each of the {len(rows)} completions is longer, with its end-of-sequence token"
        raise DataError(problem, key="sft.max_completion_tokens", value=max_completion_tokens, fix="raise it")
    if len(examples) < len(rows):
        left_out["completion_too_long"] = len(rows) - len(examples)
    return examples, left_out
