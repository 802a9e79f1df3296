"""rollouts/step_N.parquet: every sampled completion with its verdict, and a viewer for them."""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from rich.console import Console
from rich.rule import Rule
from rich.text import Text

from rlkit.errors import RlkitError
from rlkit.telemetry.record import read_mapping
from rlkit.types import Group

# T = tokens of the completion. `parts` maps reward names to scores (JSON text in the file); `score` is null where
# the sample could not be scored, `advantage` where it was not trained on.
SCHEMA = pa.schema({
    "step": pa.int64(), "ordinal": pa.int64(), "index": pa.int64(), "prompt_id": pa.string(), "prompt": pa.string(),
    "completion": pa.string(), "reference": pa.string(), "score": pa.float64(), "parts": pa.string(),
    "answer": pa.string(), "reason": pa.string(), "finish_reason": pa.string(), "advantage": pa.float64(),
    "tokens": pa.int64(), "token_ids": pa.list_(pa.int64()), "behavior_logprobs": pa.list_(pa.float32()),
    "versions": pa.list_(pa.int64()),
})  # fmt: skip
TEXT_COLUMNS = [field.name for field in SCHEMA if not pa.types.is_list(field.type)]
"""All columns but the token arrays: what is needed to read a completion."""

_UNSEEN = re.compile(
    "([\x00-\x08\x0b-\x1f\x7f-\x9f\u00ad\u061c\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\ud800-\udfff])"
)


class RolloutsError(RlkitError):
    """Rollout files are missing or not what was asked for."""


def rows_of(groups: Iterable[Group], advantages: Mapping[tuple[int, int], float] | None = None) -> list[dict[str, Any]]:
    """Rows of scored groups; `advantages`: (ordinal, index) -> advantage of the samples trained on."""
    return [
        {
            "ordinal": group.ordinal,
            "index": rollout.index,
            "prompt_id": group.prompt.id,
            "prompt": group.prompt.text,
            "completion": rollout.text,
            "reference": group.prompt.reference,
            "score": verdict.score,
            "parts": verdict.parts,
            "answer": verdict.answer,
            "reason": verdict.reason,
            "finish_reason": rollout.finish_reason,
            "advantage": (advantages or {}).get((group.ordinal, rollout.index)),
            "token_ids": rollout.token_ids,
            "behavior_logprobs": rollout.behavior_logprobs,
            "versions": rollout.versions(),
        }
        for group in groups
        for rollout, verdict in zip(group.rollouts, group.verdicts, strict=True)
    ]


def write_rollouts(path: Path, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write a learner step's rows (of `rows_of`) in one rename: the file is whole or not there.

    `path` is usually run_dir / "rollouts" / f"step_{step}.parquet"; its folder is made. Raises
    RolloutsError: a field is missing or of the wrong type.
    """

    def stored(row: Mapping[str, Any]) -> dict[str, Any]:
        own = {"step": step, "tokens": len(row["token_ids"]), "parts": json.dumps(dict(row["parts"]))}
        # A lone surrogate, which UTF-8 cannot hold, becomes "?".
        return {
            k: v.encode("utf-8", "replace").decode() if isinstance(v, str) else v for k, v in {**row, **own}.items()
        }

    try:
        whole = [stored(row) for row in rows]
        table = pa.table([pa.array([row[f.name] for row in whole], f.type) for f in SCHEMA], schema=SCHEMA)
    except (KeyError, pa.ArrowInvalid, pa.ArrowTypeError) as error:
        raise RolloutsError(f"a field is missing or has the wrong type: {error}", key="step", value=step) from error
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("wb") as file:
        pq.write_table(table, file, compression="zstd")
        os.fsync(file.fileno())
    temporary.replace(path)


def rollout_steps(run_dir: Path) -> list[int]:
    """Steps whose rollouts were kept, ascending; empty where none were."""
    return sorted(int(path.stem.removeprefix("step_")) for path in (run_dir / "rollouts").glob("step_*.parquet"))


def read_rollouts(run_dir: Path, step: int | None = None, columns: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Rows of one step, or of all steps, in the order written; `parts` as a dict.

    Raises RolloutsError: the run kept no rollouts, or none of this step, or the file is broken.
    """
    steps = rollout_steps(run_dir)
    if not steps:
        fix = "train with telemetry.save_rollouts=true"
        raise RolloutsError("the run kept no rollouts", key="run", value=run_dir.name, fix=fix)
    if step is not None and step not in steps:
        expected = f"one of {steps[0]} ... {steps[-1]}"
        raise RolloutsError("no rollouts of this step", key="step", value=step, expected=expected)
    rows: list[dict[str, Any]] = []
    for one in steps if step is None else [step]:
        path = run_dir / "rollouts" / f"step_{one}.parquet"
        try:
            rows += pq.read_table(path, columns=columns).to_pylist()
        except pa.ArrowInvalid as error:
            raise RolloutsError(f"not a Parquet file: {error}", key="file", value=path.name) from error
    return [row | {"parts": json.loads(row["parts"])} if "parts" in row else row for row in rows]


def rollback_rollouts(run_dir: Path, step: int) -> None:
    """Remove rollouts of later steps than `step` (a run resumes from there)."""
    for one in rollout_steps(run_dir):
        if one > step:
            (run_dir / "rollouts" / f"step_{one}.parquet").unlink()


@dataclass(frozen=True, slots=True)
class Judge:
    """What counts as right: the run's own evaluation.correct_at, of evaluation.part or the total."""

    correct_at: float = 1.0
    part: str | None = None

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Judge:
        """The judge of a run's recipe; the schema's defaults where there is none."""
        evaluation = config.get("evaluation") or {}
        return cls(float(evaluation.get("correct_at", 1.0)), evaluation.get("part"))

    def verdict(self, row: Mapping[str, Any]) -> str:
        """ "right" (at least correct_at), "partial" (above 0), "wrong" or "unscored"."""
        score = row["score"]
        if score is not None and self.part is not None:
            score = row["parts"].get(self.part)
        if score is None:
            return "unscored"
        return "right" if score >= self.correct_at else "partial" if score > 0 else "wrong"


def visible(text: str) -> list[tuple[str, bool]]:
    r"""Text in pieces, with everything a terminal or browser would act on or hide written out.

    Control characters but tab and newline, text-direction marks and zero-width characters become
    escapes such as \x1b; the flag of such a piece is True.
    """
    pieces = []
    for i, piece in enumerate(_UNSEEN.split(text)):  # every second one is a match
        escaped = f"\\x{ord(piece):02x}" if i % 2 and ord(piece) < 256 else f"\\u{ord(piece):04x}" if i % 2 else piece
        pieces.append((escaped, bool(i % 2)))
    return [piece for piece in pieces if piece[0]]


def facts(row: Mapping[str, Any]) -> list[str]:
    """What is known of a sample besides its text, for a line above it."""
    parts = [f"{name} {'unscored' if part is None else format(part, 'g')}" for name, part in row["parts"].items()]
    advantage = [] if row["advantage"] is None else [f"advantage {row['advantage']:+.3f}"]
    where = [row["prompt_id"], f"sample {row['index']}", f"{row['tokens']} tokens ({row['finish_reason']})"]
    return [*where, *advantage, *parts]


COLOURS = {"right": "green", "partial": "blue", "wrong": "red", "unscored": "yellow"}


def _text(value: str, style: str = "") -> Text:
    """Untrusted text for rich: never markup, nothing unseen."""
    return Text.assemble(*((piece, "reverse" if escaped else "") for piece, escaped in visible(value)), style=style)


def print_rollouts(rows: Sequence[Mapping[str, Any]], console: Console, judge: Judge) -> None:
    """Print rows for reading: verdict, prompt, completion."""
    for row in rows:
        verdict = judge.verdict(row)
        colour = COLOURS[verdict]
        score = "" if row["score"] is None else f" {row['score']:g}"
        title = f"step {row['step']}  ordinal {row['ordinal']}  {verdict}{score}"
        console.print(Rule(Text(title, style=f"bold {colour}"), style=colour))
        console.print(_text("  ".join(facts(row)), "dim"))
        styles = {"prompt": "", "completion": colour, "answer": "bold", "reference": "bold", "reason": "yellow"}
        for key, style in styles.items():
            if row[key] is not None:
                console.print(Text.assemble((f"{key:>10}  ", "dim"), _text(row[key], style)))


def main(argv: Sequence[str] | None = None, console: Console | None = None) -> int:
    """Run `rlkit rollouts`; return the exit status (0, also when nothing matches). Raises RolloutsError."""
    parser = argparse.ArgumentParser(prog="rlkit rollouts", description="Read a run's completions.")
    parser.add_argument("run", type=Path, help="run folder")
    parser.add_argument("--step", type=int, help="learner step; default: the newest kept")
    parser.add_argument("--ordinal", type=int, help="one prompt group only")
    parser.add_argument("--sort", choices=("score", "length"), help="worst (unscored last) or longest first")
    parser.add_argument("--limit", type=int, default=10, help="how many (default 10)")
    which = parser.add_mutually_exclusive_group()
    for verdict in ("right", "wrong", "unscored"):
        which.add_argument(f"--{verdict}", dest="verdicts", action="store_const", const=(verdict,))
    which.set_defaults(verdicts=tuple(COLOURS))
    options = parser.parse_args(sys.argv[1:] if argv is None else argv)
    console = console or Console(highlight=False)
    steps = rollout_steps(options.run)
    step = steps[-1] if options.step is None and steps else options.step
    rows = read_rollouts(options.run, step, TEXT_COLUMNS)
    judge = Judge.of(read_mapping(options.run / "config.yaml"))
    wanted = (*options.verdicts, "partial") if "wrong" in options.verdicts else options.verdicts
    kept = [row for row in rows if options.ordinal in (None, row["ordinal"]) and judge.verdict(row) in wanted]
    order = {
        None: lambda row: (row["ordinal"], row["index"]),
        "score": lambda row: (row["score"] is None, row["score"] or 0.0),
        "length": lambda row: -row["tokens"],
    }
    chosen = sorted(kept, key=order[options.sort])[: options.limit]
    print_rollouts(chosen, console, judge)
    console.print(Text(f"{len(chosen)} of {len(rows)} rollouts of step {step}", style="dim"))
    return 0
