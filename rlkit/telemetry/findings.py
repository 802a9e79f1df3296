"""What a run's metrics say in words: problems first, each with what to do about it. The words are in report.yaml."""

from collections.abc import Iterator
from statistics import fmean, variance
from typing import Any, NamedTuple

from rlkit.telemetry.names import REPORT
from rlkit.telemetry.record import EvalCurve, RunRecord

WINDOW = 20  # steps at either end of a run that a finding speaks of
Found = Iterator[tuple[str, dict[str, Any]]]  # name of a finding in report.yaml, and the values its text shows


class Finding(NamedTuple):
    """One thing to know. level: "problem" (act on it), "note" (know it) or "good"."""

    level: str
    text: str
    remedy: str


def findings(run: RunRecord) -> list[Finding]:
    """All findings, problems first, then good news, then notes."""
    found = [*_training(run), *(one for curve in run.averages for one in _evaluation(run, curve))]
    said = []
    for name, values in found:
        level, text, remedy = REPORT["findings"][name]
        said.append(Finding(level, text.format(**values), remedy))
    return sorted(said, key=lambda finding: ("problem", "good", "note").index(finding.level))


def _training(run: RunRecord) -> Found:
    planned = run.config.get("steps")
    if run.last_step == 0:
        yield "no_step", {}
    elif planned is not None and run.last_step < planned:
        yield "unfinished", {"step": run.last_step, "planned": planned}
    for step, gap in run.pauses:
        yield "pause", {"seconds": gap, "step": step}
    if not run.averages:
        yield "no_evaluation", {}
    if dropped := sum(run.metric("off_policy/dropped")[1]):
        yield "dropped", {"count": dropped}
    if broken := sorted({name for row in run.rows for name, value in row.metrics.items() if value is None}):
        yield "not_finite", {"names": ", ".join(broken)}
    said = False
    for name, limit in REPORT["limits"].items():
        values = run.metric(name)[1][-WINDOW:]
        # "dead" only repeats what "all correct" or "all wrong" have said already
        if values and (mean := fmean(values)) > limit and not (name == "group/dead_frac" and said):
            said = True
            when = "the last step" if len(values) == 1 else f"the last {len(values)} steps"
            yield name, {"share": f"{100 * mean:.3g} %", "mean": mean, "when": when}
    # first against last steps, where the run is long enough to tell them apart
    entropy, rewards = run.metric("policy/entropy")[1], run.metric("reward/mean")[1]
    if len(entropy) >= 2 * WINDOW:
        start, end = fmean(entropy[:WINDOW]), fmean(entropy[-WINDOW:])
        if end < 0.1 * start or end > 3 * start:
            yield "entropy_collapsed" if end < start else "entropy_grew", {"start": start, "end": end}
    if len(rewards) >= 2 * WINDOW:
        head, tail = rewards[:WINDOW], rewards[-WINDOW:]
        start, end, noise = fmean(head), fmean(tail), ((variance(head) + variance(tail)) / WINDOW) ** 0.5
        if end - start <= 2 * noise:
            yield "reward_fell" if end - start < -2 * noise else "reward_flat", {"start": start, "end": end}


def _evaluation(run: RunRecord, curve: EvalCurve) -> Found:
    what, change = f"{curve.label} on {curve.set}", curve.change
    if curve.before is None or curve.after is None:
        yield "no_before" if curve.before is None else "no_after", {"what": what}
    if change is not None and change.error is not None:
        name = "noise" if not change.sure else "rose" if change.value > 0 else "fell"
        yield name, {"what": what, "change": change.value, "size": abs(change.value), "error": change.error}
    for name in ("truncated_frac", "unscored_frac"):
        values = run.metric(f"eval/{curve.set}/{name}")[1]
        if values and values[-1] > 0.05:
            yield f"eval_{name}", {"share": f"{100 * values[-1]:.3g} %", "set": curve.set}
