"""Records round trip exactly; a changed or missing byte is found and never used."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from buffer_work import START, Clock, open_at, prompt, request, rollout, same, sample_all, train
from hypothesis import given, settings
from hypothesis import strategies as st

from rlkit.buffer.payloads import RecordFiles, decode, encode
from rlkit.errors import BufferError
from rlkit.types import Prompt, Rollout, Verdict, VersionSpan

TEXT = st.text()  # controls too
INT64 = st.integers(-(2**63), 2**63 - 1)

NOWHERE: Any = None  # files need no connection


@st.composite
def any_rollout(draw: st.DrawFn) -> Rollout:
    tokens = draw(st.integers(0, 9))
    width = draw(st.sampled_from((2**8 - 1, 2**16 - 1, 2**31 - 1, 2**63 - 1)))
    ids = st.one_of(st.integers(-width - 1, width), st.integers(0, width), st.just(7))

    def array(values: st.SearchStrategy[object], dtype: type) -> np.ndarray:
        return np.array(draw(st.lists(values, min_size=tokens, max_size=tokens)), dtype=dtype)

    cuts = sorted(draw(st.sets(st.integers(1, max(1, tokens - 1))))) if tokens > 1 else []
    edges = [0, *cuts, tokens] if tokens else []
    bits = array(st.integers(0, 2**32 - 1), np.uint32)  # every float there is, NaN payloads too
    return Rollout(
        ordinal=draw(st.integers(0, 2**62)),
        index=draw(st.integers(0, 2**31)),
        token_ids=array(ids, np.int64),
        behavior_logprobs=bits.view(np.float32),
        loss_mask=array(st.booleans(), np.bool_),
        segments=array(INT64, np.int64),
        version_spans=tuple(
            VersionSpan(version=draw(st.integers(0, 2**62)), start=a, end=b) for a, b in itertools.pairwise(edges)
        ),
        finish_reason=draw(st.sampled_from(("stop", "length"))),
        engine_id=draw(st.text()),
        text=draw(TEXT),
    )


@settings(max_examples=150, deadline=None)
@given(st.lists(any_rollout(), max_size=3))
def test_rollouts_round_trip_bit_for_bit(rollouts: list[Rollout]) -> None:
    decoded = decode(encode(rollouts, "it"), list[Rollout])
    assert len(decoded) == len(rollouts)
    assert all(same(x, y) for x, y in zip(rollouts, decoded, strict=True))
    for x in decoded:
        assert x.token_ids.flags.writeable and x.loss_mask.flags.writeable


METADATA = st.recursive(
    st.one_of(st.none(), st.booleans(), INT64, st.floats(allow_nan=False), TEXT),
    lambda x: st.one_of(st.lists(x, max_size=3), st.dictionaries(TEXT, x, max_size=3)),
    max_leaves=8,
)


def typed(value: object) -> object:
    """Values with their types, so that True is not 1."""
    if isinstance(value, dict):
        return {k: typed(v) for k, v in value.items()}
    if isinstance(value, list):
        return [typed(v) for v in value]
    return type(value), value


@settings(max_examples=100, deadline=None)
@given(TEXT, TEXT, st.lists(INT64), st.none() | TEXT, st.dictionaries(st.text(), METADATA, max_size=3))
def test_prompts_round_trip(
    name: str, text: str, tokens: list[int], reference: str | None, metadata: dict[str, object]
) -> None:
    sent = Prompt(
        id=name, text=text, token_ids=np.array(tokens, dtype=np.int64), reference=reference, metadata=metadata
    )
    got = decode(encode(sent, "it"), Prompt)
    assert (got.id, got.text, got.reference) == (name, text, reference)
    assert got.token_ids.dtype == np.int64 and got.token_ids.tolist() == tokens
    assert typed(got.metadata) == typed(metadata)


@settings(max_examples=50, deadline=None)
@given(
    st.lists(
        st.builds(
            Verdict,
            score=st.none() | st.floats(allow_nan=False, allow_infinity=False),
            parts=st.dictionaries(st.text(), st.none() | st.floats(allow_nan=False), max_size=2),
            answer=st.none() | TEXT,
            reason=st.none() | TEXT,
        ),
        max_size=3,
    )
)
def test_verdicts_round_trip(verdicts: list[Verdict]) -> None:
    assert decode(encode(verdicts, "it"), list[Verdict]) == verdicts


def test_a_long_rollout_takes_eight_bytes_a_token() -> None:
    tokens = 16_384
    long = replace(
        rollout(0, 0, [0]),
        token_ids=np.arange(tokens) * 9,
        behavior_logprobs=np.linspace(-3, 0, tokens, dtype=np.float32),
        loss_mask=np.ones(tokens, dtype=np.bool_),
        segments=np.zeros(tokens, dtype=np.int64),
        version_spans=(VersionSpan(version=0, start=0, end=tokens),),
        text="",
    )
    assert len(encode([long], "it")) < 8 * tokens + 200


def test_numpy_scalars_in_metadata_become_numbers() -> None:
    sent = replace(prompt(0), metadata={"n": np.int64(3), "x": [np.float32(0.5)]})
    assert decode(encode(sent, "it"), Prompt).metadata == {"n": 3, "x": [0.5]}


class Place(NamedTuple):
    ordinal: int
    start: int
    lease_id: int


@settings(max_examples=60, deadline=None)
@given(data=st.data(), record=st.binary(min_size=1, max_size=60))
def test_every_changed_bit_is_found(
    data: st.DataObject, record: bytes, tmp_path_factory: pytest.TempPathFactory
) -> None:
    store, place = RecordFiles(tmp_path_factory.mktemp("payloads")), Place(7, 4, 3)
    store.write(NOWHERE, [(place, record)])
    assert store.read(NOWHERE, [place]) == [record]
    (path,) = store._folder.iterdir()
    clean = path.read_bytes()
    bit = data.draw(st.integers(0, len(clean) * 8 - 1))
    dirty = bytearray(clean)
    dirty[bit // 8] ^= 1 << bit % 8
    for damaged in (dirty, clean[: data.draw(st.integers(0, len(clean) - 1))]):
        path.write_bytes(damaged)
        with pytest.raises(BufferError, match=r"7-4-3.*cannot be used"):
            store.read(NOWHERE, [place])


def test_records_of_ended_groups_are_deleted(tmp_path: Path) -> None:
    store = RecordFiles(tmp_path)
    for ordinal in (2, 9, 10):
        store.write(NOWHERE, [(Place(ordinal, 0, ordinal), bytes([ordinal]))])
    store.delete_below(NOWHERE, 10)
    assert store.read(NOWHERE, [Place(10, 0, 10)]) == [b"\n"]
    with pytest.raises(BufferError, match="9-0-9.*missing"):
        store.read(NOWHERE, [Place(9, 0, 9)])


def damage(folder: Path, how: str) -> None:
    path = min((folder / "payloads").iterdir())
    data = bytearray(path.read_bytes())
    if how == "flipped":
        data[-1] ^= 1
        path.write_bytes(data)
    elif how == "torn":
        path.write_bytes(data[:-1])
    else:
        path.unlink()


@pytest.mark.parametrize("how", ["flipped", "torn", "missing"])
def test_damaged_rollouts_are_never_trained_on(tmp_path: Path, how: str) -> None:
    buffer = open_at(tmp_path, Clock())
    request(buffer, 2, samples=2)
    sample_all(buffer)
    damage(tmp_path, how)
    with pytest.raises(BufferError, match="cannot be used"):
        buffer.take(2)
    assert buffer.stats().states["taken"] == 0
    report = buffer.rollback(START)
    assert report.corrupt == report.requested_again == (0,) and report.restored == (1,)
    sample_all(buffer)
    assert [g.ordinal for g in train(buffer)] == [0, 1]
    buffer.close()


def test_rows_never_refer_to_a_record_that_was_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    buffer = open_at(tmp_path, Clock())
    request(buffer, 1, samples=2)
    (lease,) = buffer.lease("a", 2, 60.0)
    work = [rollout(0, i, [0]) for i in range(2)]
    real = Path.write_bytes

    def full(path: Path, data: bytes) -> int:
        real(path, data[:5])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(BufferError, match="No space left"):
        buffer.submit(lease, work)
    monkeypatch.undo()
    assert buffer.stats().states["leased"] == 1
    buffer.submit(lease, work)
    buffer.score(lease, [Verdict(score=1.0)] * 2)
    (group,) = buffer.take(1) or []
    assert all(same(x, y) for x, y in zip(work, group.rollouts, strict=True))
    buffer.close()
