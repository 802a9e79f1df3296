"""From rows to tokenised prompts with reference answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import jinja2
import msgspec
import numpy as np
from omegaconf import MISSING

from rlkit.config.schema import DatasetConfig
from rlkit.data.encoding import bos_prefix, encode
from rlkit.data.files import Row
from rlkit.data.reference import Reference
from rlkit.data.sources import LocalFile, as_source
from rlkit.data.template import RowTemplate, field_names
from rlkit.errors import ConfigError, DataError, nearest
from rlkit.types import IntArray, Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TOO_LONG = "prompt_too_long"


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptSet:
    """Prompts in row order. `left_out` counts rows by reason: the caller prints it."""

    prompts: tuple[Prompt, ...]
    left_out: Mapping[str, int]

    def __len__(self) -> int:
        return len(self.prompts)

    def shared_with(self, other: PromptSet) -> int:
        """How many prompts of `other` have a text that is also here: a leak between sets."""
        texts = {prompt.text for prompt in self.prompts}
        return sum(prompt.text in texts for prompt in other.prompts)


@dataclass(frozen=True, slots=True, kw_only=True)
class RenderedRow:
    """A row with its prompt: what prompts and supervised examples have in common."""

    number: int
    id: str
    row: Row
    text: str
    token_ids: IntArray  # [prompt tokens]


def load_prompts(
    config: DatasetConfig, tokenizer: PreTrainedTokenizerBase, key: str, require_reference: bool
) -> PromptSet:
    """Read a data set and make a `Prompt` of every row that is short enough.

    A prompt's metadata are the row's fields as JSON values; the fields of a nested `metadata`
    mapping are lifted to the top (and win over a column of the same name).

    Args:
        config: the data set. key: its place in the recipe, e.g. "data.train", for messages.
        tokenizer: as from `rlkit.learner.model.load_tokenizer`.
        require_reference: a reward needs a reference answer of every row.

    Raises:
        ConfigError: settings that contradict each other.
        DataError: no row, no row short enough, a missing field, a missing reference, an id used
            twice, a character the tokenizer does not know; the message names the row.
    """
    if require_reference and config.reference is None:
        raise ConfigError(
            "the reward needs reference answers",
            key=f"{key}.reference",
            value=None,
            expected='a template of the answer, e.g. "{answer}"',
        )
    reference = Reference(config, key)
    rendered, left_out = render_rows(config, tokenizer, key)
    prompts = tuple(
        Prompt(
            id=item.id,
            text=item.text,
            token_ids=item.token_ids,
            reference=reference(item.row, item.number, item.id, require_reference),
            metadata=_metadata(item, key),
        )
        for item in rendered
    )
    return PromptSet(prompts=prompts, left_out=left_out)


def render_rows(
    config: DatasetConfig, tokenizer: PreTrainedTokenizerBase, key: str
) -> tuple[list[RenderedRow], dict[str, int]]:
    """Read, render and tokenise every row; the rows kept, and counts of the others by reason."""
    rows = _rows(config, key)
    ids = _ids(config, rows, key)
    template = RowTemplate(config.prompt, f"{key}.prompt")
    contents: list[str] = []
    for number, row in enumerate(rows):
        content = template(row, number)
        if not content:
            raise DataError(
                f"row {number} (id {ids[number]!r}) has an empty prompt: a field is null or empty",
                key=f"{key}.prompt",
                value=config.prompt,
                fix="leave the row out of the data",
            )
        contents.append(content)
    texts = _chat(contents, config, tokenizer, key) if config.chat else contents
    if config.system is not None and not config.chat:
        raise ConfigError(
            "a system message needs a chat template",
            key=f"{key}.system",
            value=config.system,
            fix=f"set {key}.chat=true, or put the text into {key}.prompt",
        )
    prefix = [] if config.chat else bos_prefix(tokenizer)
    kept: list[RenderedRow] = []
    for number, tokens in enumerate(encode(texts, tokenizer, ids, key)):
        if len(prefix) + len(tokens) > config.max_prompt_tokens:
            continue
        kept.append(
            RenderedRow(
                number=number,
                id=ids[number],
                row=rows[number],
                text=texts[number],
                token_ids=np.asarray(prefix + tokens, dtype=np.int64),
            )
        )
    if not kept:
        raise DataError(
            f"each of the {len(rows)} prompts is longer",
            key=f"{key}.max_prompt_tokens",
            value=config.max_prompt_tokens,
            fix="raise it",
        )
    too_long = len(rows) - len(kept)
    return kept, {TOO_LONG: too_long} if too_long else {}


def _rows(config: DatasetConfig, key: str) -> list[Row]:
    if config.path is not None:
        source = as_source(LocalFile(path=config.path), f"{key}.path")
    elif config.source == MISSING:
        raise ConfigError(
            f"{key} has no source",
            key=f"{key}.source",
            value=None,
            expected="a component such as {_target_: rlkit.data.sources.LocalFile, path: ...}",
            fix=f"set {key}.path=FILE, or choose a data set",
        )
    else:
        source = as_source(config.source, f"{key}.source")
    rows = source.rows()
    count = len(rows) if config.limit is None else min(config.limit, len(rows))
    if count < 1:
        raise DataError(
            f"the data set is empty: {len(rows)} rows, limit {config.limit}",
            key=f"{key}.source",
            value=config.path or config.source,
        )
    return [rows[number] for number in range(count)]


def _ids(config: DatasetConfig, rows: Sequence[Row], key: str) -> list[str]:
    if config.id_field is None:
        return [str(number) for number in range(len(rows))]
    seen: dict[str, int] = {}
    for number, row in enumerate(rows):
        if row.get(config.id_field) is None:
            raise DataError(
                f"row {number} has no such field.{nearest(config.id_field, row)}",
                key=f"{key}.id_field",
                value=config.id_field,
                expected=f"one of {', '.join(field_names(row))}, or null for row numbers",
            )
        row_id = str(row[config.id_field])
        if row_id in seen:
            raise DataError(
                f"rows {seen[row_id]} and {number} have the same id {row_id!r}",
                key=f"{key}.id_field",
                value=config.id_field,
                expected="a field that is unique, or null for row numbers",
            )
        seen[row_id] = number
    return list(seen)


def _chat(contents: Sequence[str], config: DatasetConfig, tokenizer: PreTrainedTokenizerBase, key: str) -> list[str]:
    if tokenizer.chat_template is None:
        raise DataError(
            "the tokenizer has no chat template",
            key=f"{key}.chat",
            value=True,
            fix=f"set model.chat_template, or {key}.chat=false",
        )
    system = [] if config.system is None else [{"role": "system", "content": config.system}]
    try:
        return [
            str(
                tokenizer.apply_chat_template(
                    [*system, {"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
                )
            )
            for content in contents
        ]
    except jinja2.TemplateError as error:
        raise DataError(
            f"the chat template refuses the messages: {error}",
            key=f"{key}.chat",
            value=True,
            fix="some templates take no system message; or set model.chat_template",
        ) from error


def _metadata(item: RenderedRow, key: str) -> dict[str, Any]:
    nested = item.row.get("metadata")
    merged = {name: value for name, value in item.row.items() if name != "metadata"}
    if isinstance(nested, Mapping):
        merged |= nested
    elif nested is not None:
        merged["metadata"] = nested
    try:
        # Through JSON once here, so that a reward sees the same values before and after the buffer.
        plain: dict[str, Any] = msgspec.json.decode(msgspec.json.encode(merged, enc_hook=_plain))
    except (TypeError, ValueError) as error:
        raise DataError(
            f"{key}: row {item.id!r} has a field that cannot be written as JSON: {error}",
            fix="name the fields to keep in the source's `columns`",
        ) from error
    return plain


def _plain(value: Any) -> Any:
    if isinstance(value, str):  # numpy.str_ and other subclasses
        return str(value)
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, np.ndarray):
        return value.tolist()
    raise TypeError(f"{type(value).__name__}")
