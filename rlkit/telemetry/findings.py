"""What a run's metrics say in words: problems first, each with what to do about it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from statistics import fmean, stdev

from rlkit.telemetry.record import EvalCurve, RunRecord

WINDOW = 20
"""Steps at either end of a run that a finding speaks of."""

# metric, mean of the last WINDOW steps above which it is said, what is said, what to do
SHARES = (
    ("group/all_correct_frac", 0.5, "of groups {when} are all correct: they carry no signal",
     "Raise the difficulty of the prompts."),
    ("group/all_wrong_frac", 0.5, "of groups {when} are all wrong: they carry no signal",
     "Easier prompts, more samples_per_prompt, or a warm start."),
    ("group/dead_frac", 0.5, "of groups {when} are dead (all scores equal)",
     "Prompts are too easy or too hard: spread their difficulty, or raise samples_per_prompt."),
    ("reward/unscored_frac", 0.01, "of samples could not be scored {when}",
     "Read their reasons: rlkit rollouts <run> --unscored."),
    ("reward/timeout_frac", 0.01, "of samples ran into the verifier's time limit {when}",
     "Raise reward.timeout_s or reward.workers."),
    ("completion/truncated_frac", 0.1, "of completions were cut at the length limit {when}",
     "Raise rollout.max_completion_tokens, or reward stopping."),
    ("policy/clip_frac/low", 0.3, "of tokens were clipped from below {when}",
     "Smaller learning rate or fewer updates_per_step."),
    ("policy/clip_frac/high", 0.3, "of tokens were clipped from above {when}",
     "Smaller learning rate or fewer updates_per_step."),
)  # fmt: skip
LOWER_RATE = "Lower the learning rate; check mismatch/logprob_absdiff."


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing to know. level: "problem" (act on it), "note" (know it) or "good"."""

    level: str
    text: str
    remedy: str = ""


def findings(run: RunRecord) -> list[Finding]:
    """All findings, problems first, then good news, then notes."""
    found = [*_progress(run), *_shares(run), *_policy(run), *_time(run)]
    found += [finding for curve in run.averages for finding in _evaluation(run, curve)]
    return sorted(found, key=lambda finding: ("problem", "good", "note").index(finding.level))


def percent(fraction: float) -> str:
    """Example: percent(0.004) is "0.4 %", percent(0.62) is "62 %"."""
    return f"{100 * fraction:.{int(0 < fraction < 0.02)}f} %"


def _last(run: RunRecord, name: str) -> list[float]:
    return run.metric(name)[1][-WINDOW:]


def _progress(run: RunRecord) -> Iterator[Finding]:
    if run.last_step == 0:
        yield Finding("note", "No training step has been logged yet.")
    elif run.planned_steps is not None and run.last_step < run.planned_steps:
        text = f"The run stands at step {run.last_step} of {run.planned_steps}."
        yield Finding("note", text, "Start it again with the same name to go on from the newest checkpoint.")
    for step, gap in run.pauses:
        yield Finding("note", f"Nothing ran for {gap:.0f} s before step {step}: the run was resumed there.")
    if not run.averages:
        text = "No held-out evaluation was logged, so nothing can be said about what was learnt."
        yield Finding("note", text, "Add a set under data.eval.")
    if dropped := sum(run.metric("off_policy/dropped")[1]):
        yield Finding("note", f"{dropped:.0f} groups were dropped in the run.", "`rlkit buffer <run>` has the reasons.")


def _evaluation(run: RunRecord, curve: EvalCurve) -> Iterator[Finding]:
    change, what = curve.change, f"{curve.label} on {curve.set}"
    if curve.before is None:
        yield Finding("note", f"{what} was not measured before training.", "Set evaluation.at_start=true.")
    if curve.after is None:
        yield Finding("note", f"{what} has not been measured after training yet.")
    if change is not None and change.error is None:
        yield Finding("note", f"{what} changed by {change.value:+.3f}; no standard error.")
    elif change is not None and change.error is not None:
        size = f"{abs(change.value):.3f} +- {change.error:.3f}"
        if change.value > 2 * change.error:
            yield Finding("good", f"{what} rose by {size}.")
        elif change.value < -2 * change.error:
            yield Finding("problem", f"{what} fell by {size}.", LOWER_RATE)
        else:
            remedy = "More held-out rows or evaluation.samples, or more training, before any claim."
            yield Finding("note", f"{what} changed by {change.value:+.3f} +- {change.error:.3f}: within noise.", remedy)
    for name, part, remedy in (
        ("truncated_frac", "were cut at the length limit", "Raise max_completion_tokens."),
        ("unscored_frac", "could not be scored", "Mend the verifier."),
    ):
        values = run.metric(f"eval/{curve.set}/{name}")[1]
        if values and values[-1] > 0.05:
            text = f"{percent(values[-1])} of the last evaluation's samples on {curve.set} {part}"
            yield Finding("problem", f"{text}: its figures are not to be trusted.", remedy)


def _shares(run: RunRecord) -> Iterator[Finding]:
    said: set[str] = set()
    for name, limit, text, remedy in SHARES:
        values = _last(run, name)
        # "dead" only repeats what "all correct" or "all wrong" have said already
        if values and fmean(values) > limit and not (name == "group/dead_frac" and said):
            said.add(name)
            when = "in the last step" if len(values) == 1 else f"in the last {len(values)} steps"
            yield Finding("problem", f"{percent(fmean(values))} {text.format(when=when)}.", remedy)


def _policy(run: RunRecord) -> Iterator[Finding]:
    entropy = run.metric("policy/entropy")[1]
    if len(entropy) >= 2 * WINDOW:
        start, end = fmean(entropy[:WINDOW]), fmean(entropy[-WINDOW:])
        if end < 0.1 * start:
            text = f"Entropy collapsed from {start:.3g} to {end:.3g} nats: the policy hardly explores."
            yield Finding("problem", text, "Lower the learning rate, raise the upper clip or entropy_coefficient.")
        elif end > 3 * start:
            text = f"Entropy grew from {start:.3g} to {end:.3g} nats: the policy is falling apart."
            yield Finding("problem", text, LOWER_RATE)
    rewards = run.metric("reward/mean")[1]
    if len(rewards) >= 2 * WINDOW:
        head, tail = rewards[:WINDOW], rewards[-WINDOW:]
        before, after = fmean(head), fmean(tail)
        noise = ((stdev(head) ** 2 + stdev(tail) ** 2) / WINDOW) ** 0.5
        if after - before < -2 * noise:
            yield Finding("problem", f"Training reward fell from {before:.3f} to {after:.3f}.", LOWER_RATE)
        elif after - before <= 2 * noise:
            text = f"Training reward did not move ({before:.3f} to {after:.3f})."
            yield Finding("problem", text, "Check dead groups, then samples, then the learning rate.")
    mismatch = _last(run, "mismatch/logprob_absdiff/mean")
    if mismatch and fmean(mismatch) > 0.05:
        text = f"Engine and learner disagree by {fmean(mismatch):.3g} nats a token on average."
        yield Finding("problem", text, "Temperature, dtype or weights differ; correct with importance weights.")
    broken = sorted({n for row in run.rows for n, value in row.metrics.items() if value is None})
    if broken:
        text = f"Not finite in at least one step: {', '.join(broken)}."
        yield Finding("problem", text, "Look at the steps around it in metrics.jsonl; lower the learning rate.")


def _time(run: RunRecord) -> Iterator[Finding]:
    if not (run.config or {}).get("max_staleness"):
        return  # synchronous: the learner waits by design
    wait, step = sum(_last(run, "time/wait_rollout")), sum(_last(run, "time/step"))
    if step > 0 and wait / step > 0.5:
        text = f"The learner waited for rollouts {percent(wait / step)} of the time."
        yield Finding("note", text, "More rollout workers, or a larger max_staleness.")
