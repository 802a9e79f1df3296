"""From rows to tokenised prompts with reference answers, or with target completions; and their order."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import jinja2
import msgspec
import numpy as np
import xxhash
from transformers import PreTrainedTokenizerBase

from rlkit.config.components import build
from rlkit.config.schema import DatasetConfig
from rlkit.data.sources import Row, as_source
from rlkit.data.text import encode, render
from rlkit.errors import ConfigError, DataError, calling
from rlkit.types import IntArray, Prompt


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptSet:
    """Prompts in row order. `left_out` counts rows by reason: the caller prints it."""

    prompts: tuple[Prompt, ...]
    left_out: Mapping[str, int]

    def __len__(self) -> int:
        return len(self.prompts)

    def fingerprint(self) -> str:
        """Checksum of what a run depends on: ids, tokens and references, in order."""
        digest = xxhash.xxh3_128()
        for prompt in self.prompts:
            digest.update(repr((prompt.id, prompt.reference)).encode("utf-8", "backslashreplace"))
            digest.update(prompt.token_ids.astype("<i8").tobytes())
        return digest.hexdigest()

    def shared_with(self, other: Self) -> int:
        """How many prompts of `other` have a text that is also here: a leak between sets."""
        texts = {prompt.text for prompt in self.prompts}
        return sum(prompt.text in texts for prompt in other.prompts)


class PromptOrder:
    """Maps an ordinal, the position in the run's endless sequence of prompts, to a prompt.

    Ordinals [e * count, (e + 1) * count) are epoch e: each prompt once, shuffled by (seed, e), or in file order.
    """

    def __init__(self, count: int, seed: int, shuffle: bool = True) -> None:
        self.count, self.seed, self.shuffle = count, seed, shuffle
        self._kept: tuple[int, IntArray] = (-1, np.empty(0, dtype=np.int64))  # (epoch, permutation)

    def index(self, ordinal: int) -> int:
        """Index of the prompt at `ordinal` (0 or more)."""
        epoch, offset = divmod(ordinal, self.count)
        if not self.shuffle:
            return offset
        if epoch != self._kept[0]:
            # numpy keeps a bit generator's raw stream the same in every version, but not `shuffle` and `permutation`:
            # with sorted raw draws a resumed run is right also after an upgrade.
            draws = np.random.Philox(np.random.SeedSequence((self.seed, epoch))).random_raw(self.count)
            self._kept = epoch, np.argsort(draws, kind="stable").astype(np.int64)
        return int(self._kept[1][offset])


@dataclass(frozen=True, slots=True)
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

    `key` is the set's place in the recipe, e.g. "data.train", for messages; with `require_reference` every row must
    have a reference answer. `ConfigError`: bad reference_pattern. `DataError`, which names the row: no row (short
    enough), a missing field or reference, an unknown character.
    """
    rendered, left_out = render_rows(config, tokenizer, key)
    prompts = tuple(
        Prompt(
            id=item.id, text=item.text, token_ids=item.token_ids,
            reference=_reference(config, item, key, require_reference), metadata=_metadata(item, key),
        )
        for item in rendered
    )  # fmt: skip
    return PromptSet(prompts=prompts, left_out=left_out)


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
    with calling(teacher, f"{key}.completion"):
        texts = [teacher(item.row, item.number) for item in rows]
    encoded = encode(texts, tokenizer, [item.id for item in rows], f"{key}.completion")
    examples = list[tuple[RenderedRow, IntArray]]()
    for item, text, tokens in zip(rows, texts, encoded, strict=True):
        if not tokens or eos in tokens:
            problem = f"the completion of row {item.id!r} is empty or ends before its end: {text[:200]!r}"
            expected = f"text; {tokenizer.eos_token!r} is added behind it, and must not be inside"
            raise DataError(problem, key=f"{key}.completion", value=config.completion, expected=expected)
        if len(tokens) < max_completion_tokens:
            examples.append((item, np.array([*tokens, eos])))
    if not examples:
        problem = f"each of the {len(rows)} completions is longer, with its end-of-sequence token"
        raise DataError(problem, key="sft.max_completion_tokens", value=max_completion_tokens, fix="raise it")
    if len(examples) < len(rows):
        left_out["completion_too_long"] = len(rows) - len(examples)
    return examples, left_out


def render_rows(
    config: DatasetConfig, tokenizer: PreTrainedTokenizerBase, key: str
) -> tuple[list[RenderedRow], dict[str, int]]:
    """Read, render and tokenise every row; the rows kept, and counts of the others by reason."""
    source = as_source(config.source, f"{key}.source")
    with calling(source, f"{key}.source"):
        rows: Sequence[Row] = source.rows()[: config.limit]
    if not rows:
        raise DataError("the data set is empty", key=f"{key}.source", value=config.source)
    ids = [str(number) for number in range(len(rows))]
    texts = [render(config.prompt, row, number, f"{key}.prompt") or "" for number, row in enumerate(rows)]
    if "" in texts:
        number = texts.index("")
        problem = f"row {number} has an empty prompt: a field is null or empty"
        raise DataError(problem, key=f"{key}.prompt", value=config.prompt, fix="leave the row out of the data")
    texts = _chat(texts, config, tokenizer, key) if config.chat else texts
    # A chat template writes its own. Llama's tokenizer starts every text with <bos>, Qwen's and GPT-2's do not.
    prefix = [] if config.chat else [token for token in tokenizer("").input_ids[:1] if token == tokenizer.bos_token_id]
    kept = [
        RenderedRow(number, ids[number], rows[number], texts[number], np.array(tokens))
        for number, own in enumerate(encode(texts, tokenizer, ids, key))
        if len(tokens := prefix + own) <= config.max_prompt_tokens
    ]
    if not kept:
        problem, limit = f"each of the {len(rows)} prompts is longer", config.max_prompt_tokens
        raise DataError(problem, key=f"{key}.max_prompt_tokens", value=limit, fix="raise it")
    return kept, {"prompt_too_long": len(rows) - len(kept)} if len(kept) < len(rows) else {}


def _chat(contents: Sequence[str], config: DatasetConfig, tokenizer: PreTrainedTokenizerBase, key: str) -> list[str]:
    system = [] if config.system is None else [{"role": "system", "content": config.system}]
    conversations = [[*system, {"role": "user", "content": content}] for content in contents]
    try:
        return list(tokenizer.apply_chat_template(conversations, add_generation_prompt=True, tokenize=False))
    except (jinja2.TemplateError, ValueError) as error:  # ValueError: the tokenizer has no template
        problem = f"no chat template, or one that refuses the messages: {error}"
        fix = f"set model.chat_template, or {key}.chat=false; some templates take no system message"
        raise DataError(problem, key=f"{key}.chat", value=True, fix=fix) from error


def _reference(config: DatasetConfig, item: RenderedRow, key: str, required: bool) -> str | None:
    """The row's reference answer: `reference`, then `reference_pattern`."""
    template = config.reference
    text = None if template is None else render(template, item.row, item.number, f"{key}.reference")
    if text and config.reference_pattern is not None:
        pattern_is = {"key": f"{key}.reference_pattern", "value": config.reference_pattern}
        try:
            found = re.search(config.reference_pattern, text)
        except re.error as error:
            raise ConfigError(f"not a regular expression: {error}", **pattern_is) from error
        if found is None:
            raise DataError(f"nothing in row {item.id!r} matches: {text[-200:]!r}", **pattern_is)
        text = (found[1 if found.re.groups else 0] or "").strip()
    if not text and required:
        problem = f"row {item.id!r} has no reference answer (null or empty), and the reward needs it"
        fix = f'set {key}.reference to a template of the answer, e.g. "{{answer}}", or leave the row out of the data'
        raise DataError(problem, key=f"{key}.reference", value=config.reference, fix=fix)
    return text or None


def _metadata(item: RenderedRow, key: str) -> dict[str, Any]:
    fields = dict(item.row)
    if isinstance(nested := fields.get("metadata"), Mapping):
        del fields["metadata"]
        fields |= nested
    try:
        # Through JSON once here, so that a reward sees the same values before and after the buffer.
        return msgspec.json.decode(msgspec.json.encode(fields), type=dict[str, Any])
    except (TypeError, ValueError) as error:
        problem = f"{key}: row {item.id!r} has a field that cannot be written as JSON: {error}"
        raise DataError(problem, fix="leave that field out of the data") from error
