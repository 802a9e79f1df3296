"""report.html: a run on one page that needs nothing else, and its pictures under plots/."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup, escape
from rich.console import Console
from rich.text import Text

from rlkit.telemetry.console import duration
from rlkit.telemetry.environment import redact_text
from rlkit.telemetry.figures import draw_all
from rlkit.telemetry.findings import findings
from rlkit.telemetry.record import RunRecord, load_run
from rlkit.telemetry.rollouts import TEXT_COLUMNS, Judge, RolloutsError, read_rollouts, rollout_steps, visible
from rlkit.telemetry.summary import with_error

HEAD_CHARACTERS = 1200
TAIL_CHARACTERS = 500
SAMPLES = {"right": 2, "wrong": 2, "partial": 1, "unscored": 1}


def _seen(text: object) -> Markup:
    """Untrusted text for HTML: escaped, and nothing in it hidden or acted upon."""
    return Markup("").join(
        Markup('<span class="seen">{}</span>').format(piece) if unseen else escape(piece)
        for piece, unseen in visible(str(text))
    )


def _crop(text: str) -> Markup:
    """`_seen`, with the middle of a long text left out (answers stand at the end)."""
    left_out = len(text) - HEAD_CHARACTERS - TAIL_CHARACTERS
    if left_out <= 0:
        return _seen(text)
    gap = Markup('<span class="left-out"> [{} characters left out] </span>').format(left_out)
    return _seen(text[:HEAD_CHARACTERS]) + gap + _seen(text[-TAIL_CHARACTERS:])


def _plus_minus(text: str) -> Markup:
    """`_seen`, with the terminal's "+-" as the sign it stands for."""
    return _seen(text.replace(" +- ", " \N{PLUS-MINUS SIGN} "))


def _pick(rows: Sequence[dict[str, Any]], kinds: Sequence[str]) -> list[dict[str, Any]]:
    """A few right, wrong and other samples, of different prompts where there are enough."""
    chosen: list[dict[str, Any]] = []
    for kind, limit in SAMPLES.items():
        of_kind = [row | {"verdict": kind} for row, k in zip(rows, kinds, strict=True) if k == kind]
        of_kind.sort(key=lambda row: (row["ordinal"], row["index"]))
        first = {row["ordinal"]: row for row in reversed(of_kind)}  # each prompt's first sample
        of_kind.sort(key=lambda row: row is not first[row["ordinal"]])
        chosen += of_kind[:limit]
    return chosen


def _stages(run: RunRecord) -> tuple[list[dict[str, Any]], str]:
    """Samples of the first and the last kept step; and why there are none."""
    steps = rollout_steps(run.run_dir)
    if not steps:
        return [], "No rollouts were kept (telemetry.save_rollouts)."
    stages = []
    judge = Judge.of(run.config)
    try:
        for step in dict.fromkeys((steps[0], steps[-1])):
            rows = read_rollouts(run.run_dir, step, TEXT_COLUMNS)
            kinds = [judge.verdict(row) for row in rows]
            parts = [f"{kinds.count(kind)} {kind}" for kind in SAMPLES if kind in kinds]
            counts = f"{', '.join(parts)} of {len(rows)}"
            stages.append({"step": step, "counts": counts, "rows": _pick(rows, kinds)})
    except RolloutsError as error:
        return [], f"The rollouts cannot be read: {error.problem}"
    return stages, ""


def _cards(run: RunRecord) -> list[dict[str, str]]:
    """Headline figures besides the held-out ones."""
    cards = []
    rewards = run.metric("reward/mean")[1]
    if len(rewards) == 1:
        cards.append({"label": "training reward", "big": f"{rewards[0]:.3f}", "sub": "of the only step"})
    elif rewards:
        size = max(1, min(20, len(rewards) // 2))
        first, last = sum(rewards[:size]) / size, sum(rewards[-size:]) / size
        each = "step" if size == 1 else f"{size} steps"
        big = f"{first:.3f} \N{RIGHTWARDS ARROW} {last:.3f}"
        cards.append({"label": "training reward", "big": big, "sub": f"mean of first and last {each}"})
    planned = "" if run.planned_steps is None else f" of {run.planned_steps}"
    times = run.metric("time/step")[1]
    pace = f"{sum(times) / len(times):.2f} s a step" if times else ""
    cards.append({"label": "learner steps", "big": f"{run.last_step}{planned}", "sub": pace})
    resumed = len(run.pauses)
    pieces = "in one piece" if not resumed else "resumed once" if resumed == 1 else f"resumed {resumed} times"
    return [*cards, {"label": "run time", "big": duration(run.seconds), "sub": pieces}]


def _lead(run: RunRecord) -> str:
    """One line under the title: what was trained, how, with which seed."""
    config = run.config or {}
    model, algorithm = config.get("model") or {}, config.get("algorithm") or {}
    architecture = (model.get("architecture") or {}).get("model_type")
    targets = [(algorithm.get(piece) or {}).get("_target_", "") for piece in ("advantage", "loss", "aggregation")]
    parts = [
        model.get("path") or (architecture and f"{architecture} from scratch"),
        *(str(target).split(".")[-1] for target in targets),
        f"seed {config['seed']}" if "seed" in config else "",
    ]
    return " \N{MIDDLE DOT} ".join(str(part) for part in parts if part) or "no recipe was kept"


def _environment_rows(environment: Mapping[str, Any] | None) -> list[tuple[str, str]]:
    """Keys with their values as readable text."""
    rows = []
    for key, value in (environment or {}).items():
        if key == "command" and isinstance(value, list):
            value = " ".join(map(str, value))
        elif isinstance(value, dict):
            value = ", ".join(f"{k} {v}" for k, v in value.items())
        rows.append((key, value if isinstance(value, str) else json.dumps(value)))
    return rows


def write_report(run_dir: Path) -> Path:
    """Write report.html and plots/*.png into a run folder and return the report's path.

    The same files give the same bytes. What the run did not log is said to be missing.

    Raises:
        RunError: the folder does not exist, or its config.yaml or environment.json is broken.
        MetricError: metrics.jsonl is broken in the middle.
    """
    run = load_run(run_dir)
    drawn, empty = draw_all(run)
    stages, no_samples = _stages(run)
    page = Environment(autoescape=True, undefined=StrictUndefined)
    page.filters |= {"seen": _seen, "crop": _crop, "pm": _plus_minus}
    template = resources.files("rlkit.telemetry").joinpath("templates/report.html.j2").read_text()
    html = page.from_string(template).render(
        run=run,
        lead=_lead(run),
        cards=_cards(run),
        findings=findings(run),
        drawn=drawn,
        empty=empty,
        stages=stages,
        no_samples=no_samples,
        config_text=None if run.config_text is None else redact_text(run.config_text),
        environment=_environment_rows(run.environment),
        with_error=with_error,
    )
    temporary = run_dir / "report.html.tmp"
    temporary.write_text(html, encoding="utf-8")
    return temporary.replace(run_dir / "report.html")


def main(run_dir: str | Path) -> int:
    """Write the report of a run folder and print its path; return the exit status."""
    path = write_report(Path(run_dir))
    Console(highlight=False).print(Text(str(path)), soft_wrap=True)
    return 0
