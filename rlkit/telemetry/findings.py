"""What a run's metrics say in words: problems first, each with what to do about it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from statistics import fmean, stdev

from rlkit.telemetry.record import RunRecord

WINDOW = 20
"""Steps at either end of a run that a finding speaks of."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing to know. level: "problem" (act on it), "note" (know it) or "good"."""

    level: str
    text: str
    remedy: str = ""


def _last(run: RunRecord, name: str) -> list[float]:
    return run.metric(name)[1][-WINDOW:]


def _first(run: RunRecord, name: str) -> list[float]:
    return run.metric(name)[1][:WINDOW]


def _window(values: list[float]) -> str:
    return "in the last step" if len(values) == 1 else f"in the last {len(values)} steps"


def percent(fraction: float) -> str:
    """Example: percent(0.004) is "0.4 %", percent(0.62) is "62 %"."""
    return f"{100 * fraction:.{int(0 < fraction < 0.02)}f} %"


def _progress(run: RunRecord) -> Iterator[Finding]:
    done = run.trained_steps[-1] if run.trained_steps else 0
    if done == 0:
        yield Finding("note", "No training step has been logged yet.")
    elif run.planned_steps is not None and done < run.planned_steps:
        yield Finding(
            "note",
            f"The run stands at step {done} of {run.planned_steps}.",
            "Start it again with the same name to go on from the newest checkpoint.",
        )
    for step, gap in run.pauses:
        yield Finding("note", f"Nothing ran for {gap:.0f} s before step {step}: the run was resumed there.")


def _evaluation(run: RunRecord) -> Iterator[Finding]:
    if not run.averages:
        yield Finding(
            "note",
            "No held-out evaluation was logged, so nothing can be said about what was learnt.",
            "Add a set under data.eval.",
        )
    for curve in run.averages:
        change = curve.change
        what = f"{curve.label} on {curve.set}"
        if change is None:
            if curve.before is None:
                text = f"{what} was not measured before training."
                yield Finding("note", text, "Set evaluation.at_start=true.")
            if curve.after is None:
                yield Finding("note", f"{what} has not been measured after training yet.")
        elif change.error is None:
            yield Finding("note", f"{what} changed by {change.value:+.3f}; no standard error.")
        elif change.value > 2 * change.error:
            yield Finding("good", f"{what} rose by {change.value:.3f} +- {change.error:.3f}.")
        elif change.value < -2 * change.error:
            yield Finding(
                "problem",
                f"{what} fell by {-change.value:.3f} +- {change.error:.3f}.",
                "Lower the learning rate, check mismatch/logprob_absdiff, read late samples.",
            )
        else:
            yield Finding(
                "note",
                f"{what} changed by {change.value:+.3f} +- {change.error:.3f}: within noise.",
                "More held-out rows or evaluation.samples, or more training, before any claim.",
            )
        for name, part, remedy in (
            ("truncated_frac", "were cut at the length limit", "Raise max_completion_tokens."),
            ("unscored_frac", "could not be scored", "Mend the verifier."),
        ):
            values = run.metric(f"eval/{curve.set}/{name}")[1]
            if values and values[-1] > 0.05:
                yield Finding(
                    "problem",
                    f"{percent(values[-1])} of the last evaluation's samples on {curve.set} {part}:"
                    " its figures are not to be trusted.",
                    remedy,
                )


def _groups(run: RunRecord) -> Iterator[Finding]:
    dominated = False
    for name, what, remedy in (
        ("group/all_correct_frac", "correct", "Raise the difficulty of the prompts."),
        ("group/all_wrong_frac", "wrong",
         "Easier prompts, more samples_per_prompt, or a warm start."),
    ):  # fmt: skip
        values = _last(run, name)
        if values and fmean(values) > 0.5:
            dominated = True
            yield Finding(
                "problem",
                f"{percent(fmean(values))} of groups {_window(values)} are all {what}: they carry no signal.",
                remedy,
            )
    dead = _last(run, "group/dead_frac")
    if dead and fmean(dead) > 0.5 and not dominated:
        yield Finding(
            "problem",
            f"{percent(fmean(dead))} of groups {_window(dead)} are dead (all scores equal).",
            "Prompts are too easy or too hard: spread their difficulty, or raise samples_per_prompt.",
        )


def _samples(run: RunRecord) -> Iterator[Finding]:
    for name, limit, what, remedy in (
        ("reward/unscored_frac", 0.01, "of samples could not be scored",
         "Read their reasons: rlkit rollouts <run> --unscored."),
        ("reward/timeout_frac", 0.01, "of samples ran into the verifier's time limit",
         "Raise reward.timeout_s or reward.workers."),
        ("completion/truncated_frac", 0.1, "of completions were cut at the length limit",
         "Raise rollout.max_completion_tokens, or reward stopping."),
        ("policy/clip_frac/low", 0.3, "of tokens were clipped from below",
         "Smaller learning rate or fewer updates_per_step."),
        ("policy/clip_frac/high", 0.3, "of tokens were clipped from above",
         "Smaller learning rate or fewer updates_per_step."),
    ):  # fmt: skip
        values = _last(run, name)
        if values and fmean(values) > limit:
            yield Finding("problem", f"{percent(fmean(values))} {what} {_window(values)}.", remedy)
    dropped = sum(run.metric("off_policy/dropped")[1])
    if dropped:
        text = f"{dropped:.0f} groups were dropped in the run."
        yield Finding("note", text, "The reasons are in logs/.")


def _policy(run: RunRecord) -> Iterator[Finding]:
    first, last = _first(run, "policy/entropy"), _last(run, "policy/entropy")
    if len(run.metric("policy/entropy")[1]) >= 2 * WINDOW:
        start, end = fmean(first), fmean(last)
        if end < 0.1 * start:
            yield Finding(
                "problem",
                f"Entropy collapsed from {start:.3g} to {end:.3g} nats: the policy hardly explores.",
                "Lower the learning rate, raise the upper clip or entropy_coefficient.",
            )
        elif end > 3 * start:
            yield Finding(
                "problem",
                f"Entropy grew from {start:.3g} to {end:.3g} nats: the policy is falling apart.",
                "Lower the learning rate; check mismatch/logprob_absdiff.",
            )
    rewards = run.metric("reward/mean")[1]
    if len(rewards) >= 2 * WINDOW:
        head, tail = rewards[:WINDOW], rewards[-WINDOW:]
        change = fmean(tail) - fmean(head)
        noise = ((stdev(head) ** 2 + stdev(tail) ** 2) / WINDOW) ** 0.5
        if change < -2 * noise:
            yield Finding(
                "problem",
                f"Training reward fell from {fmean(head):.3f} to {fmean(tail):.3f}.",
                "Lower the learning rate; check mismatch/logprob_absdiff.",
            )
        elif change <= 2 * noise:
            yield Finding(
                "problem",
                f"Training reward did not move ({fmean(head):.3f} to {fmean(tail):.3f}).",
                "Check dead groups, then samples, then the learning rate.",
            )
    mismatch = _last(run, "mismatch/logprob_absdiff/mean")
    if mismatch and fmean(mismatch) > 0.05:
        yield Finding(
            "problem",
            f"Engine and learner disagree by {fmean(mismatch):.3g} nats a token on average.",
            "Temperature, dtype or weights differ; correct with importance weights if they must.",
        )
    broken = sorted({n for row in run.rows for n, value in row.metrics.items() if value is None})
    if broken:
        yield Finding(
            "problem",
            f"Not finite in at least one step: {', '.join(broken)}.",
            "Look at the steps around it in metrics.jsonl; lower the learning rate.",
        )


def _time(run: RunRecord) -> Iterator[Finding]:
    if not (run.config or {}).get("max_staleness"):
        return  # synchronous: the learner waits by design
    wait, step = _last(run, "time/wait_rollout"), _last(run, "time/step")
    if wait and step and sum(step) > 0 and len(wait) == len(step):
        share = sum(wait) / sum(step)
        if share > 0.5:
            yield Finding(
                "note",
                f"The learner waited for rollouts {percent(share)} of the time.",
                "More rollout workers, or a larger max_staleness.",
            )


RULES: tuple[Callable[[RunRecord], Iterator[Finding]], ...] = (
    _progress,
    _evaluation,
    _groups,
    _samples,
    _policy,
    _time,
)


def findings(run: RunRecord) -> list[Finding]:
    """All findings, problems first, then good news, then notes."""
    order = {"problem": 0, "good": 1, "note": 2}
    found = [finding for rule in RULES for finding in rule(run)]
    return sorted(found, key=lambda finding: order[finding.level])
