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
from rlkit.telemetry.findings import findings
from rlkit.telemetry.plots import draw_all
from rlkit.telemetry.record import RunRecord, load_run
from rlkit.telemetry.rollouts import TEXT_COLUMNS, Judge, RolloutsError, read_rollouts, visible
from rlkit.telemetry.summary import with_error

HEAD_CHARACTERS = 1200
TAIL_CHARACTERS = 500
SAMPLES_OF_A_KIND = 2
KINDS = ("right", "wrong", "partial", "unscored")


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


def _pick(rows: Sequence[dict[str, Any]], judge: Judge) -> list[dict[str, Any]]:
    """A few right, wrong and other samples, of different prompts where there are enough."""
    chosen: list[dict[str, Any]] = []
    for verdict in KINDS:
        kind = [row for row in rows if judge.verdict(row) == verdict]
        kind.sort(key=lambda row: (row["ordinal"], row["index"]))
        seen: set[int] = set()
        fresh = [r for r in kind if not (r["ordinal"] in seen or seen.add(r["ordinal"]))]  # type: ignore[func-returns-value]
        rest = [row for row in kind if row not in fresh]
        limit = SAMPLES_OF_A_KIND if verdict in {"right", "wrong"} else 1
        chosen += [{**row, "verdict": verdict} for row in (fresh + rest)[:limit]]
    return chosen


def _stages(run: RunRecord) -> tuple[list[dict[str, Any]], str]:
    """Samples of the first and the last kept step; and why there are none."""
    if not run.rollout_steps:
        return [], "No rollouts were kept (telemetry.save_rollouts)."
    stages = []
    judge = Judge.of(run.config)
    try:
        for step in dict.fromkeys((run.rollout_steps[0], run.rollout_steps[-1])):
            rows = read_rollouts(run.run_dir, step, TEXT_COLUMNS)
            kinds = [judge.verdict(row) for row in rows]
            parts = [f"{kinds.count(k)} {k}" for k in KINDS if k in kinds]
            counts = f"{', '.join(parts)} of {len(rows)}"
            stages.append({"step": step, "counts": counts, "rows": _pick(rows, judge)})
    except RolloutsError as error:
        return [], f"The rollouts cannot be read: {error.problem}"
    return stages, ""


def _cards(run: RunRecord) -> list[dict[str, str]]:
    """Headline figures besides the held-out ones."""
    cards = []
    steps, rewards = run.metric("reward/mean")
    if steps:
        size = max(1, min(20, len(rewards) // 2))
        first, last = sum(rewards[:size]) / size, sum(rewards[-size:]) / size
        each = "step" if size == 1 else f"{size} steps"
        arrow = "\N{RIGHTWARDS ARROW}"
        several = len(rewards) > 1
        cards.append(
            {
                "label": "training reward",
                "big": f"{first:.3f} {arrow} {last:.3f}" if several else f"{last:.3f}",
                "sub": f"mean of first and last {each}" if several else "of the only step",
            }
        )
    done = run.trained_steps[-1] if run.trained_steps else 0
    planned = "" if run.planned_steps is None else f" of {run.planned_steps}"
    step_times = run.metric("time/step")[1]
    pace = f"{sum(step_times) / len(step_times):.2f} s a step" if step_times else ""
    cards.append({"label": "learner steps", "big": f"{done}{planned}", "sub": pace})
    resumed = len(run.pauses)
    times = "once" if resumed == 1 else f"{resumed} times"
    cards.append(
        {"label": "run time", "big": duration(run.seconds), "sub": f"resumed {times}" if resumed else "in one piece"}
    )
    return cards


def _lead(run: RunRecord) -> str:
    """One line under the title: what was trained, how, with which seed."""
    config = run.config or {}
    model = config.get("model") or {}
    architecture = model.get("architecture") or {}
    parts = [
        model.get("path") or (architecture and f"{architecture.get('model_type')} from scratch"),
        *(
            str(((config.get("algorithm") or {}).get(piece) or {}).get("_target_", "")).split(".")[-1]
            for piece in ("advantage", "loss", "aggregation")
        ),
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
    path = run_dir / "report.html"
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(html, encoding="utf-8")
    temporary.replace(path)
    return path


def main(run_dir: str | Path) -> int:
    """Write the report of a run folder and print its path; return the exit status."""
    path = write_report(Path(run_dir))
    Console(highlight=False).print(Text(str(path)), soft_wrap=True)
    return 0
