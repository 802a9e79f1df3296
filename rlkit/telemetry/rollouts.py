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
from typing import Any, TypedDict

import pyarrow as pa
import pyarrow.parquet as pq
from rich.console import Console
from rich.rule import Rule
from rich.text import Text

from rlkit.errors import RlkitError
from rlkit.telemetry.record import read_config
from rlkit.types import Group

_TYPES = {
    "step": pa.int64(), "ordinal": pa.int64(), "index": pa.int64(), "prompt_id": pa.string(), "prompt": pa.string(),
    "completion": pa.string(), "reference": pa.string(), "score": pa.float64(), "parts": pa.string(),
    "answer": pa.string(), "reason": pa.string(), "finish_reason": pa.string(), "advantage": pa.float64(),
    "token_ids": pa.list_(pa.int64()), "behavior_logprobs": pa.list_(pa.float32()), "versions": pa.list_(pa.int64()),
    "tokens": pa.int64(),
}  # fmt: skip
_OPTIONAL = {"reference", "score", "answer", "reason", "advantage"}
SCHEMA = pa.schema([pa.field(name, kind, nullable=name in _OPTIONAL) for name, kind in _TYPES.items()])
TEXT_COLUMNS = tuple(name for name, kind in _TYPES.items() if not pa.types.is_list(kind))
"""All columns but the token arrays: what is needed to read a completion."""

_FILE = re.compile(r"step_(\d+)\.parquet")
_UNSEEN = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u00ad\u061c\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\ud800-\udfff]"
)


class RolloutsError(RlkitError):
    """Rollout files are missing or not what was asked for."""


class RolloutRow(TypedDict):
    """One completion. T = number of its tokens; arrays are anything Arrow takes (numpy, list).

    `parts` maps reward names to scores (JSON text in the file); `score` is None where it could not
    be scored, `advantage` where it was not trained on.
    """

    ordinal: int
    index: int
    prompt_id: str
    prompt: str
    completion: str
    reference: str | None
    score: float | None
    parts: Mapping[str, float | None]
    answer: str | None
    reason: str | None
    finish_reason: str
    advantage: float | None
    token_ids: Sequence[int]  # [T]
    behavior_logprobs: Sequence[float]  # [T]
    versions: Sequence[int]  # [T]


def rows_of(groups: Iterable[Group], advantages: Mapping[tuple[int, int], float] | None = None) -> list[RolloutRow]:
    """Rows of scored groups; `advantages`: (ordinal, index) -> advantage of the samples trained on."""
    known = advantages or {}
    return [
        RolloutRow(
            ordinal=group.ordinal,
            index=rollout.index,
            prompt_id=group.prompt.id,
            prompt=group.prompt.text,
            completion=rollout.text,
            reference=group.prompt.reference,
            score=verdict.score,
            parts=verdict.parts,
            answer=verdict.answer,
            reason=verdict.reason,
            finish_reason=rollout.finish_reason,
            advantage=known.get((group.ordinal, rollout.index)),
            token_ids=rollout.token_ids,  # type: ignore[typeddict-item]  # numpy, as Arrow likes
            behavior_logprobs=rollout.behavior_logprobs,  # type: ignore[typeddict-item]
            versions=rollout.versions(),  # type: ignore[typeddict-item]
        )
        for group in groups
        for rollout, verdict in zip(group.rollouts, group.verdicts, strict=True)
    ]


def _storable(value: Any) -> Any:
    """Text that UTF-8 can hold: a lone surrogate, which no decoder should yield, becomes '?'."""
    return value.encode("utf-8", "replace").decode() if isinstance(value, str) else value


def write_rollouts(path: Path, step: int, rows: Sequence[RolloutRow]) -> None:
    """Write a learner step's rollouts in one rename: the file is whole or not there.

    `path` is usually run_dir / "rollouts" / f"step_{step}.parquet"; its folder is made. Raises
    RolloutsError: a row lacks a field, has one too many, or one of the wrong type.
    """
    expected = RolloutRow.__required_keys__
    for row in rows:
        if wrong := expected ^ row.keys():
            problem = f"fields missing or unknown: {', '.join(sorted(wrong))}"
            raise RolloutsError(problem, key="rollout row", value=(row.get("ordinal"), row.get("index")))
    columns: dict[str, list[Any]] = {
        name: [_storable(row[name]) for row in rows]  # type: ignore[literal-required]
        for name in expected
    }
    columns["step"] = [step] * len(rows)
    columns["parts"] = [json.dumps(dict(row["parts"])) for row in rows]
    columns["tokens"] = [len(row["token_ids"]) for row in rows]
    try:
        table = pa.table([pa.array(columns[f.name], f.type) for f in SCHEMA], schema=SCHEMA)
        table.validate(full=True)
    except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
        raise RolloutsError(f"a field has the wrong type: {error}", key="step", value=step) from error
    if null := [f.name for f in SCHEMA if not f.nullable and table[f.name].null_count]:
        raise RolloutsError(f"None in {', '.join(null)}", key="step", value=step)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    pq.write_table(table, temporary, compression="zstd")
    with temporary.open("rb") as file:
        os.fsync(file.fileno())
    temporary.replace(path)


def rollout_steps(run_dir: Path) -> list[int]:
    """Steps whose rollouts were kept, ascending; empty where none were."""
    names = (_FILE.fullmatch(path.name) for path in (run_dir / "rollouts").glob("step_*.parquet"))
    return sorted(int(match[1]) for match in names if match)


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
            rows += pq.read_table(path, columns=None if columns is None else list(columns)).to_pylist()
        except pa.ArrowInvalid as error:
            raise RolloutsError(f"not a Parquet file: {error}", key="file", value=path.name) from error
    return [row | {"parts": json.loads(row["parts"])} if "parts" in row else row for row in rows]


def rollback_rollouts(run_dir: Path, step: int) -> int:
    """Remove rollouts of later steps than `step` (a run resumes from there); return how many."""
    later = [one for one in rollout_steps(run_dir) if one > step]
    for one in later:
        (run_dir / "rollouts" / f"step_{one}.parquet").unlink()
    return len(later)


@dataclass(frozen=True, slots=True)
class Judge:
    """What counts as right: the run's own evaluation.correct_at, of evaluation.part or the total."""

    correct_at: float = 1.0
    part: str | None = None

    @classmethod
    def of(cls, config: Mapping[str, Any] | None) -> Judge:
        """The judge of a run's recipe; the schema's defaults where there is none."""
        evaluation = (config or {}).get("evaluation") or {}
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
    pieces: list[tuple[str, bool]] = []
    end = 0
    for match in _UNSEEN.finditer(text):
        code = ord(match[0])
        pieces += [(text[end : match.start()], False), (f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}", True)]
        end = match.end()
    return [piece for piece in [*pieces, (text[end:], False)] if piece[0]]


DEFAULT = Judge()
COLOURS = {"right": "green", "partial": "blue", "wrong": "red", "unscored": "yellow"}


def _text(value: str, style: str = "") -> Text:
    """Untrusted text for rich: never markup, nothing unseen."""
    out = Text(style=style)
    for piece, escaped in visible(value):
        out.append(piece, style="reverse" if escaped else "")
    return out


def print_rollouts(rows: Sequence[Mapping[str, Any]], console: Console, judge: Judge = DEFAULT) -> None:
    """Print rows for reading: verdict, prompt, completion."""
    for row in rows:
        verdict = judge.verdict(row)
        colour = COLOURS[verdict]
        score = "" if row["score"] is None else f" {row['score']:g}"
        where = f"step {row['step']}  ordinal {row['ordinal']}  sample {row['index']}"
        console.print(Rule(Text(f"{where}  {verdict}{score}", style=f"bold {colour}"), style=colour))
        advantage = "none" if row["advantage"] is None else f"{row['advantage']:+.3f}"
        parts = [f"{name} {'unscored' if part is None else format(part, 'g')}" for name, part in row["parts"].items()]
        facts = [f"{row['tokens']} tokens ({row['finish_reason']})", f"advantage {advantage}", *parts]
        console.print(_text("  ".join(facts), "dim"))
        styles = {"prompt": "", "completion": colour, "answer": "bold", "reference": "bold", "reason": "yellow"}
        for key, style in styles.items():
            if row[key] is not None:
                console.print(Text.assemble((f"{key:>10}  ", "dim"), _text(row[key], style)))


def select(
    rows: Sequence[dict[str, Any]],
    *,
    ordinal: int | None = None,
    verdict: str | None = None,
    sort: str | None = None,
    limit: int | None = None,
    judge: Judge = DEFAULT,
) -> list[dict[str, Any]]:
    """Rows to look at: filtered, sorted (score: worst first, unscored last; length: longest first).

    Without `sort` they come by ordinal and sample. Verdict "wrong" takes in "partial".
    """
    wanted = {verdict, "partial"} if verdict == "wrong" else {verdict}
    kept = [row for row in rows if ordinal is None or row["ordinal"] == ordinal]
    kept = [row for row in kept if verdict is None or judge.verdict(row) in wanted]
    kept.sort(key=lambda row: (row["step"], row["ordinal"], row["index"]))
    if sort == "score":
        kept.sort(key=lambda row: (row["score"] is None, row["score"] or 0.0))
    elif sort == "length":
        kept.sort(key=lambda row: -row["tokens"])
    return kept[:limit]


def main(argv: Sequence[str] | None = None, console: Console | None = None) -> int:
    """Run `rlkit rollouts`; return the exit status (0, also when nothing matches). Raises RolloutsError."""
    parser = argparse.ArgumentParser(prog="rlkit rollouts", description="Read a run's completions.")
    parser.add_argument("run", type=Path, help="run folder")
    parser.add_argument("--step", type=int, help="learner step; default: the newest kept")
    parser.add_argument("--ordinal", type=int, help="one prompt group only")
    parser.add_argument("--sort", choices=("score", "length"), help="worst or longest first")
    parser.add_argument("--limit", type=int, default=10, help="how many (default 10)")
    which = parser.add_mutually_exclusive_group()
    for verdict in ("right", "wrong", "unscored"):
        which.add_argument(f"--{verdict}", dest="verdict", action="store_const", const=verdict)
    options = parser.parse_args(sys.argv[1:] if argv is None else argv)
    console = console if console is not None else Console(highlight=False)
    steps = rollout_steps(options.run)
    step = options.step if options.step is not None or not steps else steps[-1]
    rows = read_rollouts(options.run, step, TEXT_COLUMNS)
    judge = Judge.of(read_config(options.run)[0])
    wanted = {"ordinal": options.ordinal, "verdict": options.verdict, "sort": options.sort, "limit": options.limit}
    chosen = select(rows, **wanted, judge=judge)
    print_rollouts(chosen, console, judge)
    console.print(Text(f"{len(chosen)} of {len(rows)} rollouts of step {step}", style="dim"))
    return 0
