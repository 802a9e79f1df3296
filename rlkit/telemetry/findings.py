"""What a run's metrics say in words: problems first, each with what to do about it. Limits are in report.yaml."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from statistics import fmean, stdev

import yaml

from rlkit.telemetry.names import read_resource
from rlkit.telemetry.record import EvalCurve, RunRecord

WINDOW = 20
"""Steps at either end of a run that a finding speaks of."""
LOWER_RATE = "Lower the learning rate; check mismatch/logprob_absdiff."


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing to know. level: "problem" (act on it), "note" (know it) or "good"."""

    level: str
    text: str
    remedy: str = ""


def findings(run: RunRecord) -> list[Finding]:
    """All findings, problems first, then good news, then notes."""
    found = [*_progress(run), *_limits(run), *_trends(run)]
    found += [finding for curve in run.averages for finding in _evaluation(run, curve)]
    return sorted(found, key=lambda finding: ("problem", "good", "note").index(finding.level))


def percent(fraction: float) -> str:
    """Example: percent(0.004) is "0.4 %", percent(0.62) is "62 %"."""
    return f"{100 * fraction:.{int(0 < fraction < 0.02)}f} %"


def _progress(run: RunRecord) -> Iterator[Finding]:
    planned = run.config.get("steps")
    if run.last_step == 0:
        yield Finding("note", "No training step has been logged yet.")
    elif planned is not None and run.last_step < planned:
        text = f"The run stands at step {run.last_step} of {planned}."
        yield Finding("note", text, "Start it again with the same name to go on from the newest checkpoint.")
    for step, gap in run.pauses:
        yield Finding("note", f"Nothing ran for {gap:.0f} s before step {step}: the run was resumed there.")
    if not run.averages:
        text = "No held-out evaluation was logged, so nothing can be said about what was learnt."
        yield Finding("note", text, "Add a set under data.eval.")
    if dropped := sum(run.metric("off_policy/dropped")[1]):
        yield Finding("note", f"{dropped:.0f} groups were dropped in the run.", "`rlkit buffer <run>` has the reasons.")
    if broken := sorted({name for row in run.rows for name, value in row.metrics.items() if value is None}):
        text = f"Not finite in at least one step: {', '.join(broken)}."
        yield Finding("problem", text, "Look at the steps around it in metrics.jsonl; lower the learning rate.")


def _evaluation(run: RunRecord, curve: EvalCurve) -> Iterator[Finding]:
    change, what = curve.change, f"{curve.label} on {curve.set}"
    if curve.before is None:
        yield Finding("note", f"{what} was not measured before training.", "Set evaluation.at_start=true.")
    if curve.after is None:
        yield Finding("note", f"{what} has not been measured after training yet.")
    if change is not None and change.error is not None:
        size = f"{abs(change.value):.3f} +- {change.error:.3f}"
        if not change.sure:
            text = f"{what} changed by {change.value:+.3f} +- {change.error:.3f}: within noise."
            yield Finding("note", text, "More rows or more samples would narrow it.")
        elif change.value > 0:
            yield Finding("good", f"{what} rose by {size}.")
        else:
            yield Finding("problem", f"{what} fell by {size}.", LOWER_RATE)
    for name, part, remedy in (
        ("truncated_frac", "were cut at the limit", "Raise rollout.max_completion_tokens."),
        ("unscored_frac", "could not be scored", "Mend the verifier."),
    ):
        values = run.metric(f"eval/{curve.set}/{name}")[1]
        if values and values[-1] > 0.05:
            text = f"{percent(values[-1])} of the last evaluation's samples on {curve.set} {part}"
            yield Finding("problem", f"{text}: its figures are not to be trusted.", remedy)


def _limits(run: RunRecord) -> Iterator[Finding]:
    said: set[str] = set()
    for name, (limit, text, remedy) in yaml.safe_load(read_resource("report.yaml"))["limits"].items():
        values = run.metric(name)[1][-WINDOW:]
        # "dead" only repeats what "all correct" or "all wrong" have said already
        if values and fmean(values) > limit and not (name == "group/dead_frac" and said):
            said.add(name)
            when = "the last step" if len(values) == 1 else f"the last {len(values)} steps"
            shown = text.format(share=percent(fmean(values)), mean=fmean(values), when=when)
            yield Finding("problem", shown, remedy)


def _trends(run: RunRecord) -> Iterator[Finding]:
    """First against last WINDOW steps, where the run is long enough to tell them apart."""
    entropy, rewards = run.metric("policy/entropy")[1], run.metric("reward/mean")[1]
    if len(entropy) >= 2 * WINDOW:
        start, end = fmean(entropy[:WINDOW]), fmean(entropy[-WINDOW:])
        if end < 0.1 * start:
            text = f"Entropy collapsed from {start:.3g} to {end:.3g} nats: the policy hardly explores."
            yield Finding("problem", text, "Lower the learning rate, raise the upper clip or entropy_coefficient.")
        elif end > 3 * start:
            text = f"Entropy grew from {start:.3g} to {end:.3g} nats: the policy is falling apart."
            yield Finding("problem", text, LOWER_RATE)
    if len(rewards) >= 2 * WINDOW:
        head, tail = rewards[:WINDOW], rewards[-WINDOW:]
        noise = ((stdev(head) ** 2 + stdev(tail) ** 2) / WINDOW) ** 0.5
        span = f"{fmean(head):.3f} to {fmean(tail):.3f}"
        if fmean(tail) - fmean(head) < -2 * noise:
            yield Finding("problem", f"Training reward fell from {span}.", LOWER_RATE)
        elif fmean(tail) - fmean(head) <= 2 * noise:
            text = f"Training reward did not move ({span})."
            yield Finding("problem", text, "Check dead groups, then samples, then the learning rate.")
