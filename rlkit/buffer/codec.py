"""Rollouts, prompts and verdicts as bytes: msgpack, arrays as raw little-endian numbers.

Token ids are stored in the smallest of uint8, uint16, int32, int64 that holds them, and an integer
or bool array of one repeated value as that value: a 16k-token single-turn rollout takes about
130 kB. What comes back is equal bit for bit, dtypes included. A prompt's metadata may hold None,
bool, int of any size, float, str, bytes, list, tuple and dict, nested.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
import numpy as np

from rlkit.errors import BufferError
from rlkit.types import Prompt, Rollout, Verdict, VersionSpan

_BIG_INT, _TUPLE, _DICT, _SURROGATES = 1, 2, 3, 4
_LONE = re.compile("[\ud800-\udfff]")  # surrogates msgpack's strings cannot hold
_NARROW = tuple((np.dtype(x), int(np.iinfo(x).min), int(np.iinfo(x).max)) for x in ("|u1", "<u2", "<i4", "<i8"))


class _Array(msgspec.Struct, array_like=True):
    dtype: str
    length: int
    data: bytes


class _Rollout(msgspec.Struct, array_like=True):
    ordinal: int
    index: int
    token_ids: _Array
    behavior_logprobs: _Array
    loss_mask: _Array
    segments: _Array
    version_spans: list[tuple[int, int, int]]
    finish_reason: str
    engine_id: str
    text: bytes


class _Prompt(msgspec.Struct, array_like=True):
    id: bytes
    text: bytes
    token_ids: _Array
    reference: bytes | None
    metadata: Any


class _Verdict(msgspec.Struct, array_like=True):
    score: float | None
    parts: dict[str, float | None]
    answer: bytes | None
    reason: bytes | None


def encode_rollouts(rollouts: Sequence[Rollout]) -> bytes:
    """Check and encode rollouts; BufferError names the sample and the field that is wrong."""
    return msgspec.msgpack.encode([_pack_rollout(x) for x in rollouts])


def decode_rollouts(data: bytes) -> list[Rollout]:
    """Inverse of `encode_rollouts`."""
    return [
        Rollout(
            ordinal=x.ordinal,
            index=x.index,
            token_ids=_unpack(x.token_ids, np.int64),
            behavior_logprobs=_unpack(x.behavior_logprobs, np.float32),
            loss_mask=_unpack(x.loss_mask, np.bool_),
            segments=_unpack(x.segments, np.int64),
            version_spans=tuple(VersionSpan(version=v, start=start, end=end) for v, start, end in x.version_spans),
            finish_reason=x.finish_reason,
            engine_id=x.engine_id,
            text=_string(x.text),
        )
        for x in msgspec.msgpack.decode(data, type=list[_Rollout])
    ]


def encode_prompt(prompt: Prompt) -> bytes:
    """Encode a prompt; BufferError if its metadata holds what msgpack cannot carry."""
    packed = _Prompt(
        _bytes(prompt.id),
        _bytes(prompt.text),
        _pack(prompt.token_ids, np.int64, f"prompt {prompt.id}", "token_ids"),
        None if prompt.reference is None else _bytes(prompt.reference),
        _portable(prompt.metadata, prompt.id),
    )
    return msgspec.msgpack.encode(packed)


def decode_prompt(data: bytes) -> Prompt:
    """Inverse of `encode_prompt`."""
    x = msgspec.msgpack.decode(data, type=_Prompt, ext_hook=_extension)
    return Prompt(
        id=_string(x.id),
        text=_string(x.text),
        token_ids=_unpack(x.token_ids, np.int64),
        reference=None if x.reference is None else _string(x.reference),
        metadata=x.metadata,
    )


def encode_verdicts(verdicts: Sequence[Verdict]) -> bytes:
    """Encode verdicts; a score that is not finite is refused: "not scored" is None."""
    packed = []
    for x in verdicts:
        if x.score is not None and not math.isfinite(x.score):
            raise BufferError(
                "a verdict's score must be a finite number or None",
                key="score",
                value=x.score,
                expected="a finite float, or None when the sample could not be scored",
                fix="let the verifier answer Verdict(score=None, reason=...)",
            )
        answer = None if x.answer is None else _bytes(x.answer)
        reason = None if x.reason is None else _bytes(x.reason)
        packed.append(_Verdict(x.score, dict(x.parts), answer, reason))
    return msgspec.msgpack.encode(packed)


def decode_verdicts(data: bytes) -> list[Verdict]:
    """Inverse of `encode_verdicts`."""
    return [
        Verdict(
            score=x.score,
            parts=x.parts,
            answer=None if x.answer is None else _string(x.answer),
            reason=None if x.reason is None else _string(x.reason),
        )
        for x in msgspec.msgpack.decode(data, type=list[_Verdict])
    ]


def _pack_rollout(x: Rollout) -> _Rollout:
    who = f"sample {x.index} of group {x.ordinal}"
    tokens = len(x.token_ids)
    for name in ("behavior_logprobs", "loss_mask", "segments"):
        if len(getattr(x, name)) != tokens:
            raise BufferError(
                f"{who}: {name} has another length than token_ids",
                key=name,
                value=len(getattr(x, name)),
                expected=f"{tokens} entries",
            )
    ends = [0, *(span.end for span in x.version_spans)]
    contiguous = all(
        span.start == before and span.start < span.end for before, span in zip(ends, x.version_spans, strict=False)
    )
    if not contiguous or ends[-1] != tokens:
        raise BufferError(
            f"{who}: version spans do not cover its tokens",
            key="version_spans",
            value=x.version_spans,
            expected=f"non-empty spans that cover [0, {tokens}) without gap or overlap",
        )
    return _Rollout(
        x.ordinal,
        x.index,
        _pack(x.token_ids, np.int64, who, "token_ids"),
        _pack(x.behavior_logprobs, np.float32, who, "behavior_logprobs"),
        _pack(x.loss_mask, np.bool_, who, "loss_mask"),
        _pack(x.segments, np.int64, who, "segments"),
        [(s.version, s.start, s.end) for s in x.version_spans],
        x.finish_reason,
        x.engine_id,
        _bytes(x.text),
    )


def _pack(array: np.ndarray[Any, Any], dtype: type, who: str, name: str) -> _Array:
    if not isinstance(array, np.ndarray) or array.ndim != 1 or array.dtype != dtype:
        what = f"{array.dtype}{array.shape}" if isinstance(array, np.ndarray) else type(array)
        raise BufferError(
            f"{who}: {name} has the wrong type",
            key=name,
            value=str(what),
            expected=f"a one-dimensional numpy array of {np.dtype(dtype).name}",
        )
    if array.dtype == np.float32:
        raw = array.astype("<f4", copy=False)
    elif array.dtype == np.bool_ or not len(array):
        raw = array.astype("|u1")
    else:
        low, high = int(array.min()), int(array.max())
        raw = array.astype(next(d for d, least, most in _NARROW if least <= low and high <= most))
    if raw.dtype != np.float32 and len(raw) > 1 and (raw == raw[0]).all():
        return _Array(raw.dtype.str, len(raw), raw[:1].tobytes())
    return _Array(raw.dtype.str, len(raw), raw.tobytes())


def _unpack(packed: _Array, dtype: type) -> Any:
    raw = np.frombuffer(packed.data, dtype=packed.dtype)
    if len(raw) != packed.length:
        return np.full(packed.length, raw[0], dtype=dtype)
    return raw.astype(dtype)  # a copy: torch wants writable memory


def _bytes(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")


def _string(data: bytes) -> str:
    return data.decode("utf-8", "surrogatepass")


def _portable(value: Any, prompt_id: str) -> Any:
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, int) and not -(2**63) <= value < 2**64:
        return msgspec.msgpack.Ext(_BIG_INT, hex(value).encode())
    if isinstance(value, str) and not value.isascii() and _LONE.search(value):
        return msgspec.msgpack.Ext(_SURROGATES, _bytes(value))
    if value is None or isinstance(value, bool | int | float | str | bytes):
        return value
    if isinstance(value, Mapping):
        pairs = [(_portable(k, prompt_id), _portable(v, prompt_id)) for k, v in value.items()]
        if all(type(k) is str for k, _ in pairs):
            return dict(pairs)
        return msgspec.msgpack.Ext(_DICT, msgspec.msgpack.encode(pairs))
    if isinstance(value, tuple | list):
        items = [_portable(v, prompt_id) for v in value]
        if isinstance(value, list):
            return items
        return msgspec.msgpack.Ext(_TUPLE, msgspec.msgpack.encode(items))
    raise BufferError(
        "a prompt's metadata holds something that cannot be stored",
        key=f"metadata of prompt {prompt_id}",
        value=value,
        expected="None, bool, int, float, str, bytes, and lists, tuples and dicts of them",
        fix="convert it in the data source",
    )


def _extension(code: int, data: memoryview) -> Any:
    if code == _BIG_INT:
        return int(bytes(data), 16)
    if code == _SURROGATES:
        return _string(bytes(data))
    if code == _TUPLE:
        return tuple(msgspec.msgpack.decode(data, ext_hook=_extension))
    if code == _DICT:
        return dict(msgspec.msgpack.decode(data, ext_hook=_extension))
    raise BufferError("unknown extension in stored metadata", key="code", value=code)
