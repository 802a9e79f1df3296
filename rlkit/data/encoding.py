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
    own = tokenizer("").input_ids
    starts = tokenizer.bos_token_id is not None and own[:1] == [tokenizer.bos_token_id]
    return [tokenizer.bos_token_id] if starts else []


def encode(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, ids: Sequence[str], key: str) -> list[list[int]]:
    """Token ids of every text, no special token added.

    Raises `DataError` naming the characters where a text has some the tokenizer maps to <unk>.
    """
    for row_id, text in zip(ids, texts, strict=True):
        if not text.isascii() and any("\ud800" <= letter <= "\udfff" for letter in text):
            raise DataError(
                f"{key}: row {row_id!r} has half a surrogate pair, which is no character", fix="repair the row's text"
            )
    encoded: list[list[int]] = tokenizer(list(texts), add_special_tokens=False).input_ids
    unknown = tokenizer.unk_token_id
    if unknown is None:
        return encoded
    for row_id, text, tokens in zip(ids, texts, encoded, strict=True):
        if unknown in tokens:
            single = {x: tokenizer(x, add_special_tokens=False).input_ids for x in set(text)}
            bad = sorted(x for x, token_ids in single.items() if unknown in token_ids)
            raise DataError(
                f"{key}: row {row_id!r} has text the tokenizer does not know: "
                f"{', '.join(map(repr, bad)) or 'a sequence of characters'} in {text[:200]!r}",
                fix="add the characters to model.alphabet, change the template, or leave the row out of the data",
            )
    return encoded
