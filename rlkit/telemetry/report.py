"""report.html: a run on one page that needs nothing else, and its pictures under plots/."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, StrictUndefined
from markupsafe import Markup, escape
from rich.console import Console
from rich.text import Text

from rlkit.telemetry.console import duration
from rlkit.telemetry.environment import redact_text
from rlkit.telemetry.figures import draw_all
from rlkit.telemetry.findings import findings
from rlkit.telemetry.record import RunRecord, load_run, with_error
from rlkit.telemetry.rollouts import COLOURS, RolloutsError, facts, judged_rollouts, rollout_steps, visible

HEAD_CHARACTERS = 1200
TAIL_CHARACTERS = 500
SAMPLES = 2
"""Completions of each verdict shown for a step."""


def _seen(text: object) -> Markup:
    """Untrusted text for HTML: escaped, and nothing in it hidden or acted upon; "+-" as the sign it stands for."""
    pieces = visible(str(text).replace(" +- ", " \N{PLUS-MINUS SIGN} "))
    return Markup("").join(
        Markup('<span class="seen">{}</span>').format(piece) if unseen else escape(piece) for piece, unseen in pieces
    )


def _crop(text: str) -> Markup:
    """`_seen`, with the middle of a long text left out (answers stand at the end)."""
    left_out = len(text) - HEAD_CHARACTERS - TAIL_CHARACTERS
    if left_out <= 0:
        return _seen(text)
    gap = Markup('<span class="left-out"> [{} characters left out] </span>').format(left_out)
    return _seen(text[:HEAD_CHARACTERS]) + gap + _seen(text[-TAIL_CHARACTERS:])


def _stage(run: RunRecord, step: int) -> dict[str, Any]:
    """A few samples of each verdict of a step, one of each prompt before a second one."""
    rows = [row | {"facts": facts(row)} for row in judged_rollouts(run.run_dir, step, run.config)]
    chosen, counts = [], []
    for verdict in COLOURS:
        alike = [row for row in rows if row["verdict"] == verdict]
        alike.sort(key=lambda row: (row["index"], row["ordinal"]))
        chosen += alike[:SAMPLES]
        counts += [f"{len(alike)} {verdict}"] if alike else []
    return {"step": step, "counts": f"{', '.join(counts)} of {len(rows)}", "rows": chosen}


def _cards(run: RunRecord) -> list[tuple[str, str, str]]:
    """(label, figure, remark): headline figures besides the held-out ones."""
    cards = []
    if rewards := run.metric("reward/mean")[1]:
        size = min(20, -(-len(rewards) // 2))
        first, last = sum(rewards[:size]) / size, sum(rewards[-size:]) / size
        big = f"{first:.3f} \N{RIGHTWARDS ARROW} {last:.3f}"
        cards.append(("training reward", big, f"mean of the first and last {size} of {len(rewards)} steps"))
    times = run.metric("time/step")[1]
    pace = f"{sum(times) / len(times):.2f} s a step" if times else ""
    cards.append(("learner steps", f"{run.last_step} of {run.config.get('steps', '?')}", pace))
    return [*cards, ("run time", duration(run.seconds), f"resumed {len(run.pauses)} times" if run.pauses else "")]


def _lead(run: RunRecord) -> str:
    """One line under the title: what was trained, how, with which seed."""
    model, algorithm = run.config.get("model") or {}, run.config.get("algorithm") or {}
    architecture = (model.get("architecture") or {}).get("model_type")
    pieces: Sequence[Any] = [algorithm.get(piece) or {} for piece in ("advantage", "loss", "aggregation")]
    parts = [model.get("path") or (architecture and f"{architecture} from scratch")]
    parts += [str(piece.get("_target_", "")).split(".")[-1] for piece in pieces]
    parts += [f"seed {run.config['seed']}" if "seed" in run.config else ""]
    return " \N{MIDDLE DOT} ".join(str(part) for part in parts if part)


def write_report(run_dir: Path) -> Path:
    """Write report.html and plots/*.png into a run folder and return the report's path.

    The same files give the same bytes. What the run did not log is said to be missing.

    Raises:
        RunError: the folder does not exist, or its config.yaml or environment.json is broken.
        MetricError: metrics.jsonl is broken in the middle.
    """
    run = load_run(run_dir)
    steps, stages, no_samples = rollout_steps(run_dir), [], "No rollouts were kept (telemetry.save_rollouts)."
    try:
        stages = [_stage(run, step) for step in dict.fromkeys((*steps[:1], *steps[-1:]))]
    except RolloutsError as error:
        no_samples = f"The rollouts cannot be read: {error.problem}"
    page = Environment(autoescape=True, undefined=StrictUndefined)
    page.filters |= {"seen": _seen, "crop": _crop}
    template = (resources.files("rlkit.telemetry") / "templates" / "report.html.j2").read_text("utf-8")
    config = run_dir / "config.yaml"
    html = page.from_string(template).render(
        run=run,
        lead=_lead(run),
        cards=_cards(run),
        findings=findings(run),
        drawn=draw_all(run),
        stages=stages,
        no_samples=no_samples,
        documents={
            "config.yaml": redact_text(config.read_text("utf-8")) if run.config else "",
            "environment.json": yaml.safe_dump(dict(run.environment), sort_keys=False) if run.environment else "",
        },
        with_error=with_error,
    )
    temporary = run_dir / "report.html.tmp"
    temporary.write_text(html, encoding="utf-8")
    return temporary.replace(run_dir / "report.html")


def main(run_dir: str | Path) -> int:
    """Write the report of a run folder and print its path; return the exit status."""
    Console(highlight=False).print(Text(str(write_report(Path(run_dir)))), soft_wrap=True)
    return 0
