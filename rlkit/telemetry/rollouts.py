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
from rlkit.telemetry.recipe import read_config
from rlkit.types import Group

SCHEMA = pa.schema(
    [
        pa.field("step", pa.int64(), nullable=False),
        pa.field("ordinal", pa.int64(), nullable=False),
        pa.field("index", pa.int64(), nullable=False),
        pa.field("prompt_id", pa.string(), nullable=False),
        pa.field("prompt", pa.string(), nullable=False),
        pa.field("completion", pa.string(), nullable=False),
        pa.field("reference", pa.string()),
        pa.field("score", pa.float64()),
        pa.field("parts", pa.string(), nullable=False),
        pa.field("answer", pa.string()),
        pa.field("reason", pa.string()),
        pa.field("finish_reason", pa.string(), nullable=False),
        pa.field("advantage", pa.float64()),
        pa.field("token_ids", pa.list_(pa.int64()), nullable=False),
        pa.field("behavior_logprobs", pa.list_(pa.float32()), nullable=False),
        pa.field("versions", pa.list_(pa.int64()), nullable=False),
        pa.field("tokens", pa.int64(), nullable=False),
    ]
)
TEXT_COLUMNS = tuple(f.name for f in SCHEMA if not pa.types.is_list(f.type))
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
    """Rows of whole groups.

    Args:
        groups: scored groups.
        advantages: (ordinal, index) -> advantage of the samples that were trained on.
    """
    known = {} if advantages is None else advantages
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
    """Write one step's rollouts in one rename: the file is whole or not there.

    Args:
        path: usually run_dir / "rollouts" / f"step_{step}.parquet"; its folder is made.
        step: learner step the rows were trained in.
        rows: the completions, any order.

    Raises:
        RolloutsError: a row lacks a field, has one too many, or one of the wrong type.
    """
    expected = RolloutRow.__required_keys__
    for row in rows:
        if wrong := expected ^ row.keys():
            raise RolloutsError(
                f"fields missing or unknown: {', '.join(sorted(wrong))}",
                key="rollout row",
                value=(row.get("ordinal"), row.get("index")),
                expected="the fields of rlkit.telemetry.rollouts.RolloutRow",
            )
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
        if null := [f.name for f in SCHEMA if not f.nullable and table[f.name].null_count]:
            raise RolloutsError(f"None in {', '.join(null)}", key="step", value=step)
    except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
        raise RolloutsError(f"a field has the wrong type: {error}", key="step", value=step) from error
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

    Raises:
        RolloutsError: the run kept no rollouts, or none of this step.
    """
    steps = rollout_steps(run_dir)
    if not steps or (step is not None and step not in steps):
        raise RolloutsError(
            "no rollouts of this step" if steps else "the run kept no rollouts",
            key="step" if steps else "run",
            value=step if steps else run_dir.name,
            expected=f"one of {steps[0]} ... {steps[-1]}" if steps else "rollouts/step_N.parquet",
            fix=None if steps else "train with telemetry.save_rollouts=true",
        )
    rows: list[dict[str, Any]] = []
    for one in steps if step is None else [step]:
        path = run_dir / "rollouts" / f"step_{one}.parquet"
        try:
            table = pq.read_table(path, columns=None if columns is None else list(columns))
        except pa.ArrowInvalid as error:
            raise RolloutsError(f"not a Parquet file: {error}", key="file", value=path.name) from error
        rows += table.to_pylist()
    for row in rows:
        if "parts" in row:
            row["parts"] = json.loads(row["parts"])
    return rows


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
        if match.start() > end:
            pieces.append((text[end : match.start()], False))
        code = ord(match[0])
        pieces.append((f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}", True))
        end = match.end()
    if end < len(text):
        pieces.append((text[end:], False))
    return pieces


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
        facts = f"{row['tokens']} tokens ({row['finish_reason']})  advantage {advantage}"
        for name, part in row["parts"].items():
            facts += f"  {name} {'unscored' if part is None else format(part, 'g')}"
        console.print(_text(facts, "dim"))
        for label, key, style in (
            ("prompt", "prompt", ""),
            ("completion", "completion", colour),
            ("answer", "answer", "bold"),
            ("reference", "reference", "bold"),
            ("reason", "reason", "yellow"),
        ):
            if row[key] is not None:
                console.print(Text.assemble((f"{label:>10}  ", "dim"), _text(row[key], style)))


def _is(verdict: str, asked: str) -> bool:
    return verdict == asked or (asked, verdict) == ("wrong", "partial")


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
    kept = [row for row in rows if ordinal is None or row["ordinal"] == ordinal]
    kept = [row for row in kept if verdict is None or _is(judge.verdict(row), verdict)]
    kept.sort(key=lambda row: (row["step"], row["ordinal"], row["index"]))
    if sort == "score":
        kept.sort(key=lambda row: (row["score"] is None, row["score"] or 0.0))
    elif sort == "length":
        kept.sort(key=lambda row: -row["tokens"])
    return kept[:limit]


def parser() -> argparse.ArgumentParser:
    """Command line of `rlkit rollouts`."""
    out = argparse.ArgumentParser(prog="rlkit rollouts", description="Read a run's completions.")
    out.add_argument("run", type=Path, help="run folder")
    out.add_argument("--step", type=int, help="learner step; default: the newest kept")
    out.add_argument("--ordinal", type=int, help="one prompt group only")
    out.add_argument("--sort", choices=("score", "length"), help="worst or longest first")
    out.add_argument("--limit", type=int, default=10, help="how many (default 10)")
    which = out.add_mutually_exclusive_group()
    which.add_argument("--right", dest="verdict", action="store_const", const="right")
    which.add_argument("--wrong", dest="verdict", action="store_const", const="wrong")
    which.add_argument("--unscored", dest="verdict", action="store_const", const="unscored")
    return out


def main(argv: Sequence[str] | None = None, console: Console | None = None) -> int:
    """Run `rlkit rollouts`; return the exit status (0, also when nothing matches).

    Raises:
        RolloutsError: the run kept no rollouts, or none of this step.
    """
    options = parser().parse_args(sys.argv[1:] if argv is None else argv)
    console = console if console is not None else Console(highlight=False)
    steps = rollout_steps(options.run)
    step = options.step if options.step is not None or not steps else steps[-1]
    rows = read_rollouts(options.run, step, TEXT_COLUMNS)
    judge = Judge.of(read_config(options.run)[0])
    chosen = select(
        rows, ordinal=options.ordinal, verdict=options.verdict, sort=options.sort, limit=options.limit, judge=judge
    )
    print_rollouts(chosen, console, judge)
    console.print(Text(f"{len(chosen)} of {len(rows)} rollouts of step {step}", style="dim"))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
