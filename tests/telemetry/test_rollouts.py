"""Rollout files keep everything exactly; the viewer shows it and obeys nothing in it."""

import ast
import io
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from rlkit.telemetry import rollouts as module
from rlkit.telemetry.rollouts import (
    SCHEMA,
    TelemetryError,
    main,
    read_rollouts,
    rollout_steps,
    verdict_of,
    visible,
    write_rollouts,
)
from rlkit.types import Group, Prompt, Rollout, Verdict, VersionSpan


def path_of(run_dir: Path, step: int) -> Path:
    return run_dir / "rollouts" / f"step_{step}.parquet"


def a_group() -> Group:
    prompt = Prompt(id="p/3", text="1+1=", token_ids=np.array([1]), reference="2")
    rollouts = tuple(
        Rollout(
            ordinal=3,
            index=i,
            token_ids=np.array([5, 6, 7]),
            behavior_logprobs=np.array([-0.1, -0.2, -0.3], dtype=np.float32),
            loss_mask=np.ones(3, dtype=np.bool_),
            segments=np.zeros(3, dtype=np.int64),
            version_spans=(VersionSpan(version=4, start=0, end=2), VersionSpan(version=5, start=2, end=3)),
            finish_reason="stop",
            engine_id="e",
            text=f"2{i}",
        )
        for i in range(2)
    )
    verdicts = (
        Verdict(score=1.0, parts={"math": 1.0, "format": None}, answer="2"),
        Verdict(score=None, reason="timeout"),
    )
    return Group(ordinal=3, prompt=prompt, samples=2, rollouts=rollouts, verdicts=verdicts)


def test_a_group_comes_back_exactly(tmp_path: Path) -> None:
    write_rollouts(path_of(tmp_path, 9), 9, [a_group()], {(3, 0): 0.7})
    assert pq.read_schema(path_of(tmp_path, 9)).equals(SCHEMA)
    first, second = read_rollouts(tmp_path, 9)
    assert first == {
        "step": 9,
        "ordinal": 3,
        "index": 0,
        "prompt_id": "p/3",
        "prompt": "1+1=",
        "completion": "20",
        "reference": "2",
        "score": 1.0,
        "parts": {"math": 1.0, "format": None},
        "answer": "2",
        "reason": None,
        "finish_reason": "stop",
        "advantage": 0.7,
        "token_ids": [5, 6, 7],
        "behavior_logprobs": np.array([-0.1, -0.2, -0.3], dtype=np.float32).tolist(),
        "versions": [4, 4, 5],
        "tokens": 3,
    }
    assert (second["score"], second["advantage"], second["reason"]) == (None, None, "timeout")


def test_a_step_without_rollouts_is_a_file_without_rows(tmp_path: Path) -> None:
    write_rollouts(path_of(tmp_path, 1), 1, [], {})
    assert read_rollouts(tmp_path, 1) == []


def test_steps_are_read_alone_or_together(tmp_path: Path, make_run) -> None:
    for step in (2, 10, 1):
        make_run.save_rollouts(tmp_path, step, make_run.scored_group(step, 1.0))
    assert rollout_steps(tmp_path) == [1, 2, 10]
    assert [row["step"] for row in read_rollouts(tmp_path)] == [10]
    assert set(read_rollouts(tmp_path, 2, ["score", "parts"])[0]) == {"score", "parts"}
    with pytest.raises(TelemetryError, match="1 ... 10"):
        read_rollouts(tmp_path, 3)


def test_a_write_that_dies_leaves_the_old_file(tmp_path: Path, make_run, monkeypatch: pytest.MonkeyPatch) -> None:
    make_run.save_rollouts(tmp_path, 1, make_run.scored_group(1, 1.0))

    def half(table: object, file: BinaryIO, **_: object) -> None:
        file.write(b"PAR1 half a file")
        raise OSError("disk full")

    monkeypatch.setattr(module.pq, "write_table", half)
    with pytest.raises(OSError, match="disk full"):
        make_run.save_rollouts(tmp_path, 1, make_run.scored_group(2, 0.0))
    assert [row["ordinal"] for row in read_rollouts(tmp_path)] == [1]


@given(st.text(st.characters(), max_size=60))
@settings(deadline=None)
def test_visible_leaves_nothing_to_act_on_and_loses_nothing(text: str) -> None:
    pieces = visible(text)
    shown = "".join(piece for piece, _ in pieces)
    assert all(c.isprintable() or c in "\t\n" or ord(c) > 0x7F for c in shown)
    assert not set(shown) & {chr(c) for c in (*range(0x7F, 0xA0), *range(0x202A, 0x202F), 0x200B)}
    back = "".join(ast.literal_eval(f"'{piece}'") if escaped else piece for piece, escaped in pieces)
    assert back == text


def view(run_dir: Path, *options: str) -> str:
    out = io.StringIO()
    assert main([str(run_dir), *options], Console(file=out, width=120)) == 0
    return out.getvalue()


def test_the_viewer_shows_completions_and_obeys_none(make_run) -> None:
    text = view(make_run(steps=5), "--limit", "100")
    assert "\x1b" not in text and "\u202e" not in text and "\r" not in text
    assert "\\x1b[31mred" in text and "\\u202egnp.exe" in text
    assert "[bold red]not markup[/]" in text
    assert "16 of 16 rollouts of step 5" in text


def test_colours_on_a_terminal_are_the_viewers_own(make_run) -> None:
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, color_system="standard", width=200)
    main([str(make_run(steps=5)), "--limit", "1"], console)
    assert "\x1b[32m" in out.getvalue()  # right: green
    assert "\x1b[31mred" not in out.getvalue()


def test_the_viewer_filters(make_run) -> None:
    run = make_run(steps=5)
    assert view(run, "--step", "1", "--wrong", "--limit", "99").count(" wrong 0") == 8
    assert "unscored" not in view(run, "--right")
    assert "timeout after 5.0 s" in view(run, "--unscored")
    (run / "config.yaml").write_text("evaluation: {correct_at: 2.0}")
    assert view(run, "--wrong", "--limit", "99").count("partial 1") == 4


@pytest.mark.parametrize(
    ("score", "parts", "evaluation", "verdict"),
    [
        (1.0, {}, {}, "right"),
        (0.5, {}, {}, "partial"),
        (0.5, {}, {"correct_at": 0.5}, "right"),
        (0.0, {}, {}, "wrong"),
        (-1.0, {}, {"part": None}, "wrong"),
        (None, {"math": 1.0}, {"part": "math"}, "unscored"),
        (0.2, {"math": 1.0}, {"part": "math"}, "right"),
        (1.2, {"math": 0.0}, {"part": "math"}, "wrong"),
        (1.2, {"math": None}, {"part": "math"}, "unscored"),
    ],
)
def test_right_is_what_the_recipe_calls_correct(score: float | None, parts: dict, evaluation: dict, verdict) -> None:
    assert verdict_of({"score": score, "parts": parts}, evaluation) == verdict


def test_a_run_without_rollouts_says_what_to_set(tmp_path: Path) -> None:
    with pytest.raises(TelemetryError, match=r"telemetry\.save_rollouts=true"):
        main([str(tmp_path)])
