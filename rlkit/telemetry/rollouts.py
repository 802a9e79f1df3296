"""rollouts/step_N.parquet: every sampled completion with its verdict, and a viewer for them."""

import argparse
import io
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from rich.console import Console
from rich.rule import Rule
from rich.text import Text

from rlkit.telemetry.names import TelemetryError
from rlkit.telemetry.record import read_mapping, replace_file
from rlkit.types import Group

# `parts` is JSON text, reward name -> score; `score` is null where there is none, `advantage` where not trained on.
SCHEMA = pa.schema({
    "step": pa.int64(), "ordinal": pa.int64(), "index": pa.int64(), "prompt_id": pa.string(), "prompt": pa.string(),
    "completion": pa.string(), "reference": pa.string(), "score": pa.float64(), "parts": pa.string(),
    "answer": pa.string(), "reason": pa.string(), "finish_reason": pa.string(), "advantage": pa.float64(),
    "tokens": pa.int64(), "token_ids": pa.list_(pa.int64()), "behavior_logprobs": pa.list_(pa.float32()),
    "versions": pa.list_(pa.int64()),
})  # fmt: skip
TEXT_COLUMNS = [field.name for field in SCHEMA if not pa.types.is_list(field.type)]  # all but the token arrays
COLOURS = {"right": "green", "partial": "blue", "wrong": "red", "unscored": "yellow"}
_UNSEEN = re.compile(
    "([\x00-\x08\x0b-\x1f\x7f-\x9f\u00ad\u061c\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\ud800-\udfff])"
)


def write_rollouts(path: Path, step: int, groups: Sequence[Group], advantages: Mapping[tuple[int, int], float]) -> None:
    """Write a learner step's scored groups to <run_dir>/rollouts/step_<step>.parquet, whole or not at all.

    `advantages`: (ordinal, index) -> advantage of the samples trained on.
    """
    rows: list[dict[str, Any]] = [
        {
            "step": step, "ordinal": group.ordinal, "prompt_id": group.prompt.id, "prompt": group.prompt.text,
            "reference": group.prompt.reference, "advantage": advantages.get((group.ordinal, rollout.index)),
            "index": rollout.index, "completion": rollout.text, "finish_reason": rollout.finish_reason,
            "tokens": len(rollout.token_ids), "token_ids": rollout.token_ids, "versions": rollout.versions(),
            "behavior_logprobs": rollout.behavior_logprobs, "score": verdict.score,
            "parts": json.dumps(dict(verdict.parts)), "answer": verdict.answer, "reason": verdict.reason,
        }
        for group in groups
        for rollout, verdict in zip(group.rollouts, group.verdicts, strict=True)
    ]  # fmt: skip
    for row in rows:  # a lone surrogate, which UTF-8 cannot hold, becomes "?"
        row.update({key: x.encode("utf-8", "replace").decode() for key, x in row.items() if isinstance(x, str)})
    buffer = io.BytesIO()
    # a dictionary of token arrays would take longer and no less space
    pq.write_table(pa.Table.from_pylist(rows, SCHEMA), buffer, compression="zstd", use_dictionary=TEXT_COLUMNS)
    replace_file(path, buffer.getvalue())


def rollout_steps(run_dir: Path) -> list[int]:
    """Steps whose rollouts were kept, ascending; empty where none were."""
    names = [path.stem.removeprefix("step_") for path in (run_dir / "rollouts").glob("step_*.parquet")]
    return sorted(int(name) for name in names if name.isdecimal())


def read_rollouts(
    run_dir: Path, step: int | None = None, columns: Sequence[str] = SCHEMA.names
) -> list[dict[str, Any]]:
    """Rows of a step (default: the newest) as written, `parts` a dict. TelemetryError: none kept, or a broken file."""
    steps = rollout_steps(run_dir)
    if not steps:
        fix = "train with telemetry.save_rollouts=true"
        raise TelemetryError("the run kept no rollouts", key="run", value=run_dir.name, fix=fix)
    if (step := steps[-1] if step is None else step) not in steps:
        expected = f"one of {steps[0]} ... {steps[-1]}"
        raise TelemetryError("no rollouts of this step", key="step", value=step, expected=expected)
    path = run_dir / "rollouts" / f"step_{step}.parquet"
    try:
        rows = pq.read_table(path, columns=list(columns)).to_pylist()
    except (pa.ArrowException, OSError) as error:
        raise TelemetryError(f"not a Parquet file: {error}", key="file", value=path.name) from error
    return [row | {"parts": json.loads(row["parts"])} for row in rows]


def judged_rollouts(run_dir: Path, step: int | None, config: Mapping[str, Any]) -> list[dict[str, Any]]:
    """`read_rollouts` without token arrays, each row with its "verdict" under the recipe's evaluation."""
    rows = sorted(read_rollouts(run_dir, step, TEXT_COLUMNS), key=lambda row: (row["ordinal"], row["index"]))
    return [row | {"verdict": verdict_of(row, config.get("evaluation") or {})} for row in rows]


def examples(rows: Sequence[dict[str, Any]], most: int) -> list[dict[str, Any]]:
    """At most so many judged rows of each verdict, one of each prompt before a second one."""
    ordered = sorted(rows, key=lambda row: row["index"])
    return [row for verdict in COLOURS for row in [r for r in ordered if r["verdict"] == verdict][:most]]


def verdict_of(row: Mapping[str, Any], evaluation: Mapping[str, Any]) -> str:
    """A key of COLOURS: "right" is at least evaluation.correct_at (default 1), of evaluation.part or the total."""
    score = row["score"]
    if score is not None and evaluation.get("part") is not None:
        score = row["parts"].get(evaluation["part"])
    if score is None:
        return "unscored"
    return "right" if score >= evaluation.get("correct_at", 1.0) else "partial" if score > 0 else "wrong"


def visible(text: str) -> list[tuple[str, bool]]:
    r"""Text in pieces; what a terminal or browser would act on or hide (not tab, newline) is \x1b or so, with True."""
    pieces = enumerate(_UNSEEN.split(text))  # every second one is a match
    return [(ascii(piece)[1:-1], True) if i % 2 else (piece, False) for i, piece in pieces if piece]


def facts(row: Mapping[str, Any]) -> list[str]:
    """What is known of a sample besides its text, for a line above it."""
    parts = [f"{name} {'unscored' if part is None else format(part, 'g')}" for name, part in row["parts"].items()]
    advantage = [] if row["advantage"] is None else [f"advantage {row['advantage']:+.3f}"]
    where = [row["prompt_id"], f"sample {row['index']}", f"{row['tokens']} tokens ({row['finish_reason']})"]
    return [*where, *advantage, *parts]


def _seen(text: str, style: str = "") -> Text:
    """Untrusted text: never markup, nothing unseen."""
    return Text.assemble(*((piece, "reverse" if escaped else "") for piece, escaped in visible(text)), style=style)


def main(argv: Sequence[str] | None = None, console: Console | None = None) -> int:
    """Run `rlkit rollouts`; returns 0, also when nothing matches. Raises TelemetryError."""
    parser = argparse.ArgumentParser(prog="rlkit rollouts", description="Read a run's completions.")
    parser.add_argument("run", type=Path, help="run folder")
    parser.add_argument("--step", type=int, help="learner step; default: the newest kept")
    parser.add_argument("--limit", type=int, default=10, help="how many (default 10)")
    which = parser.add_mutually_exclusive_group()
    for flag, verdicts in (("right", ["right"]), ("wrong", ["wrong", "partial"]), ("unscored", ["unscored"])):
        which.add_argument(f"--{flag}", dest="verdicts", action="store_const", const=verdicts, default=COLOURS)
    options = parser.parse_args(argv)
    console = console or Console(highlight=False)
    rows = judged_rollouts(options.run, options.step, read_mapping(options.run / "config.yaml"))
    chosen = [row for row in rows if row["verdict"] in options.verdicts][: options.limit]
    for row in chosen:
        colour, score = COLOURS[row["verdict"]], "" if row["score"] is None else f" {row['score']:g}"
        title = f"step {row['step']}  ordinal {row['ordinal']}  {row['verdict']}{score}"
        console.print(Rule(Text(title, style=f"bold {colour}"), style=colour))
        console.print(_seen("  ".join(facts(row)), "dim"))
        styles = {"prompt": "", "completion": colour, "answer": "bold", "reference": "bold", "reason": "yellow"}
        for key, style in styles.items():
            if row[key] is not None:
                console.print(Text.assemble((f"{key:>10}  ", "dim"), _seen(row[key], style)))
    step = rollout_steps(options.run)[-1] if options.step is None else options.step
    console.print(Text(f"{len(chosen)} of {len(rows)} rollouts of step {step}", style="dim"))
    return 0
