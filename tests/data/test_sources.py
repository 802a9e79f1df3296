from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlkit.data.sources import HubDataset, LocalFile, Mixture, ReasoningGym, as_source
from rlkit.errors import DataError, RlkitError

ROWS = [{"question": "1+1?", "answer": "2", "n": 1}, {"question": "a\u2028b", "answer": "c", "n": 2}]


def write(path: Path, rows: list[dict[str, Any]]) -> LocalFile:
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows, indent=1))
    else:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return LocalFile(path=str(path))


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".parquet"])
def test_every_kind_of_file_gives_the_rows_that_were_written(tmp_path: Path, suffix: str) -> None:
    assert list(write(tmp_path / f"rows{suffix}", ROWS).rows()) == ROWS


@given(st.lists(st.dictionaries(st.text(max_size=5), st.text() | st.integers() | st.none())))
def test_jsonl_round_trip(tmp_path_factory: pytest.TempPathFactory, rows: list[Any]) -> None:
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")
    assert list(LocalFile(path=str(path)).rows()) == rows


def test_unescaped_line_separator_does_not_split_a_row(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(ROWS[1], ensure_ascii=False) + "\n", encoding="utf-8")
    assert list(LocalFile(path=str(path)).rows()) == [ROWS[1]]


def test_blank_lines_and_byte_order_mark_are_accepted(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"a": 1}\n\n  \n{"a": 2}\n\n')
    assert list(LocalFile(path=str(path)).rows()) == [{"a": 1}, {"a": 2}]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (b'{"a": 1', "truncated"),
        (b'{"a": NaN}', "invalid character"),
        (b"[1, 2]", "Expected `object`, got `array`"),
        (b'"text"', "Expected `object`, got `str`"),
        (b'{"a": "\xff"}', "not UTF-8"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: bytes, words: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"a": 1}\n\n' + line + b'\n{"a": 2}\n')
    with pytest.raises(DataError, match=f"line 3.*{words}"):
        LocalFile(path=str(path)).rows()


def test_malformed_json_file_names_its_line(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_text('[\n{"a": 1},\n{"a": }\n]')
    with pytest.raises(DataError, match="byte 18"):
        LocalFile(path=str(path)).rows()
    path.write_text('{"data": []}')
    with pytest.raises(DataError, match="got `object`"):
        LocalFile(path=str(path)).rows()
    path.write_text('[{"a": 1}, 3]')
    with pytest.raises(DataError, match=r"\$\[1\]"):
        LocalFile(path=str(path)).rows()


def test_file_errors_help(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl", ROWS)
    with pytest.raises(DataError, match=r"no such file.*Did you mean 'train.jsonl'"):
        LocalFile(path=str(tmp_path / "trian.jsonl")).rows()
    with pytest.raises(DataError, match=r"\.jsonl, \.json, \.parquet"):
        LocalFile(path=str(tmp_path / "train.csv")).rows()
    (tmp_path / "torn.parquet").write_bytes(b"PAR1 torn")
    with pytest.raises(DataError, match="not a readable .parquet file"):
        LocalFile(path=str(tmp_path / "torn.parquet")).rows()


SUMS = {"min_terms": 2, "max_terms": 3, "min_digits": 1, "max_digits": 1}


def test_reasoning_gym_rows_are_repeatable_and_follow_the_seed() -> None:
    first = ReasoningGym(task="chain_sum", size=20, seed=3, settings=SUMS).rows()
    again = ReasoningGym(task="chain_sum", size=20, seed=3, settings=SUMS).rows()
    other = ReasoningGym(task="chain_sum", size=20, seed=10_000, settings=SUMS).rows()
    assert list(first) == list(again) != list(other)
    assert len(first) == 20 and set(first[0]) == {"question", "answer", "metadata"}
    assert all(2 <= row["metadata"]["num_terms"] <= 3 for row in first)


def test_exclude_keeps_sets_apart_even_with_the_same_seed() -> None:
    held_out = {
        "_target_": "rlkit.data.sources.ReasoningGym",
        "task": "chain_sum",
        "size": 50,
        "seed": 5,
        "settings": SUMS,
    }
    questions = {row["question"] for row in as_source(held_out, "eval").rows()}
    same = ReasoningGym(task="chain_sum", size=200, seed=5, settings=SUMS).rows()
    assert questions & {row["question"] for row in same}
    apart = ReasoningGym(task="chain_sum", size=200, seed=5, settings=SUMS, distinct=True, exclude=[held_out]).rows()
    drawn = {row["question"] for row in apart}
    assert len(drawn) == len(apart) == 200 and not questions & drawn


def test_a_task_with_too_few_questions_ends_with_an_error() -> None:
    tiny = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}
    with pytest.raises(DataError, match=r"only \d+ rows of 'chain_sum'"):
        ReasoningGym(task="chain_sum", size=500, settings=tiny, distinct=True).rows()


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"task": "chain_smu"}, "Did you mean 'chain_sum'"),
        ({"settings": {"terms": 3}}, "min_terms"),
        ({"settings": {"min_terms": 0}}, "refuses them"),
        ({"size": 0}, "1 or more"),
    ],
)
def test_reasoning_gym_errors_help(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(DataError, match=words):
        ReasoningGym(**{"task": "chain_sum", "size": 2, **fields}).rows()


def test_hub_data_set_reads_a_local_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "set").mkdir()
    write(tmp_path / "set" / "train.jsonl", ROWS)
    source = HubDataset(name=str(tmp_path / "set"))
    assert list(source.rows()) == ROWS
    with pytest.raises(DataError, match="split 'validation'"):
        HubDataset(name=str(tmp_path / "set"), split="validation").rows()


@dataclass(frozen=True, slots=True)
class NoRows:
    pass


def test_a_component_without_rows_is_refused() -> None:
    with pytest.raises(RlkitError, match=r"no method rows\(\)"):
        as_source({"_target_": f"{__name__}.NoRows"}, "data.train.source")


def numbered(tmp_path, name: str, count: int) -> dict:
    path = tmp_path / f"{name}.jsonl"
    path.write_text("".join(f'{{"id": "{name}{i}"}}\n' for i in range(count)))
    return {"_target_": "rlkit.data.sources.LocalFile", "path": str(path)}


def test_a_mixture_interleaves_its_sources_in_proportion(tmp_path):
    sources = (numbered(tmp_path, "a", 6), numbered(tmp_path, "b", 2))
    rows = Mixture(sources=sources, weights=(3.0, 1.0), size=8).rows()
    assert [row["id"] for row in rows] == ["a0", "a1", "b0", "a2", "a3", "a4", "b1", "a5"]
    for size in range(1, 9):  # of any beginning each share is right to less than a row
        own = [row["id"][0] for row in Mixture(sources=sources, weights=(3.0, 1.0), size=size).rows()]
        assert abs(own.count("b") - size / 4) < 1


@pytest.mark.parametrize(
    ("weights", "size", "says"),
    [((1.0,), 2, "weights"), ((1.0, 0.0), 2, "above 0"), ((1.0, 1.0), 9, "source 1 has 2 rows")],
)
def test_a_mixture_that_cannot_be_made_says_why(tmp_path, weights, size, says):
    mixture = Mixture(sources=(numbered(tmp_path, "a", 9), numbered(tmp_path, "b", 2)), weights=weights, size=size)
    with pytest.raises(DataError, match=says):
        mixture.rows()
