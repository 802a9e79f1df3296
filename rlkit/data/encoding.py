"""Text to token ids, with no character lost on the way."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rlkit.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def bos_prefix(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """[bos] where the tokenizer itself starts every text with it, else [].

    The model sees plain text begin as it did in pretraining: Llama's tokenizer adds its bos,
    Qwen's has none, and GPT-2's has one that it never adds.
    """
    first: list[int] = tokenizer("").input_ids[:1]
    return first if first == [tokenizer.bos_token_id] else []


def encode(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, ids: Sequence[str], key: str) -> list[list[int]]:
    """Token ids of every text, no special token added.

    Raises `DataError` naming the characters where a text has some the tokenizer maps to <unk>.
    """
    encoded: list[list[int]] = tokenizer(list(texts), add_special_tokens=False).input_ids
    unknown = tokenizer.unk_token_id
    if unknown is None:
        return encoded
    for row_id, text, tokens in zip(ids, texts, encoded, strict=True):
        if unknown in tokens:
            bad = [x for x in sorted(set(text)) if unknown in tokenizer(x, add_special_tokens=False).input_ids]
            shown = ", ".join(map(repr, bad)) or "a sequence of characters"
            problem = f"{key}: row {row_id!r} has text the tokenizer does not know: {shown} in {text[:200]!r}"
            fix = "add the characters to model.alphabet, change the template, or leave the row out of the data"
            raise DataError(problem, fix=fix)
    return encoded
