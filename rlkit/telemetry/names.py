"""The metric registry: every name a run may log, what it means, and what to do about it.

A name is slash groups with the statistic last. In a pattern `<name>` and `<set>` stand for a name
from the recipe, `@k` for a number, `{a,b}` for one of several, `[_se]` for an optional ending.
`docs/metrics.md` is generated from here:

    python -m rlkit.telemetry.names > docs/metrics.md
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby

from rlkit.errors import RlkitError, nearest

LEARNER_STEP = "learner step"
SFT_STEP = "sft step"


class MetricError(RlkitError):
    """A metric's name, value or file is not what telemetry can keep."""


@dataclass(frozen=True, slots=True)
class Metric:
    """One row of the glossary.

    Attributes:
        pattern: the name, with placeholders.
        unit: of the logged number.
        meaning: what is measured, and over what it is averaged.
        healthy: what it looks like when all is well.
        action: what to do when it does not.
    """

    pattern: str
    unit: str
    meaning: str
    healthy: str
    action: str

    @property
    def axis(self) -> str:
        """What `step` counts in its rows: LEARNER_STEP, or SFT_STEP for the warm start."""
        return SFT_STEP if self.pattern.startswith("sft/") else LEARNER_STEP

    @property
    def group(self) -> str:
        """First part of the name."""
        return self.pattern.split("/", 1)[0]


GROUPS: dict[str, str] = {
    "reward": "What the verifiers said of the step's samples.",
    "group": "A group is all samples of one prompt. **Dead**: all scores of its scored samples are"
    " equal, so that group-relative advantages are 0. **All correct**: dead and that score is > 0."
    " **All wrong**: dead and that score is <= 0. Hence dead = all correct + all wrong. Fractions"
    " are of the groups with at least one scored sample.",
    "advantage": "What the loss multiplies log-probs with, over the samples that are trained on.",
    "completion": "Length of what the policy wrote, in tokens, the stop token included.",
    "policy": "The policy as the learner sees it, averaged over trained tokens.",
    "learner": "The optimiser.",
    "mismatch": "Engine against learner on the same tokens under the same weights. Under"
    " asynchrony with an anchor that is not exact it contains staleness too.",
    "is": "Importance weights that correct mismatch or staleness.",
    "off_policy": "Age of the data. A version is one publish of weights; the lag of a token is the"
    " learner's version minus the version that sampled it.",
    "queue": "Groups in the buffer by state, at the end of the step.",
    "time": "Wall-clock seconds of one step. `time/step` = wait_rollout + learner + weight_sync +"
    " the rest; checkpoint and eval come on top. old_logits is a part of learner. generate and"
    " score are the rollout worker's: they lie within wait_rollout in a synchronous run and overlap"
    " the learner in an asynchronous one.",
    "perf": "Throughput and memory.",
    "eval": "Held-out sets, k samples a prompt with fixed seeds; `_se` is the standard error over"
    " prompts. Step 0 is before training.",
    "sft": "Supervised warm start; its rows count their own steps.",
    "plugin": "Anything a component from outside rlkit logs.",
}

INTRODUCTION = (
    "One JSON object a line in `metrics.jsonl`: `step`, `time` (unix seconds), `seconds` (run"
    " time since the start, summed over resumes, lost work included) and the metrics below. A"
    " metric that could say nothing in a step (clip fraction where nothing can be clipped) is left"
    " out of it; `null` is a value that was not finite. `<name>` and `<set>` come from the recipe;"
    " `@k` is a number; `[_se]` is the same with its standard error."
)

METRICS: tuple[Metric, ...] = tuple(
    Metric(*row)
    for row in (
        ("reward/mean", "score", "Mean total score (weighted sum of rewards) of scored samples.",
         "Rises, noisily; flattens late.",
         "Flat from the start: look at group/dead_frac, then at samples (`rlkit rollouts`)."),
        ("reward/std", "score", "Standard deviation of the total score over all scored samples.",
         "Well above 0.", "0 means nothing can be learnt: change the difficulty of the prompts."),
        ("reward/<name>/mean", "score",
         "Mean of one named reward before its weight, over the samples it scored.",
         "The reward you care about rises with the total.",
         "If only format or length rise, the policy games them: lower their weight."),
        ("reward/unscored_frac", "fraction",
         "Samples that could not be scored (timeout, crash, NaN). They are dropped, never 0.",
         "Below 0.01.", "Read the reasons with `rlkit rollouts`; mend the verifier."),
        ("reward/timeout_frac", "fraction", "Samples whose verifier hit reward.timeout_s.",
         "Below 0.01.", "Raise reward.timeout_s or reward.workers; look at the slow samples."),
        ("group/dead_frac", "fraction", "Groups with all scores equal.",
         "Below 0.5.", "See which of the next two it is."),
        ("group/all_correct_frac", "fraction", "Dead groups whose score is > 0.",
         "Rises as the policy learns; below 0.5.",
         "Harder prompts, or a budget that skips solved ones."),
        ("group/all_wrong_frac", "fraction", "Dead groups whose score is <= 0.",
         "Falls as the policy learns; below 0.5.",
         "Easier prompts, more samples_per_prompt, or a warm start (sft)."),
        ("group/size/{mean,max}", "samples", "Samples of a group, as the budget allotted them.",
         "samples_per_prompt where the budget is uniform.", "Look at the budget's settings."),
        ("advantage/mean", "score or sd", "Mean advantage of trained samples.",
         "Near 0 with a group baseline.", "Far from 0: the baseline is biased, or groups uneven."),
        ("advantage/std", "score or sd", "Standard deviation of the advantages.",
         "About 1 where they are normalised.", "Near 0: dead groups. Check group/dead_frac."),
        ("advantage/abs_max", "score or sd", "Largest absolute advantage.",
         "At most sqrt(group size) where normalised by the group's sd.",
         "Larger: one rare sample rules the step; larger groups or no normalisation."),
        ("completion/length/{mean,min,max}", "tokens", "Completion length over all samples.",
         "Steady or slowly changing; max below the limit.",
         "Runs to the limit: see truncated_frac. Collapses: the reward pays for short answers."),
        ("completion/truncated_frac", "fraction",
         'Samples cut at max_completion_tokens (finish_reason "length").',
         "Below 0.1.", "Raise rollout.max_completion_tokens, or reward stopping."),
        ("policy/entropy", "nats", "Mean entropy of the next-token distribution, trained tokens.",
         "Falls slowly, does not reach 0.",
         "Collapse: raise entropy_coefficient or the upper clip, lower the learning rate."),
        ("policy/clip_frac/{low,high}", "fraction",
         "Trained tokens whose ratio was clipped below / above; not logged where none can be.",
         "0.001 to 0.2.", "Higher: smaller learning rate or fewer updates_per_step."),
        ("policy/kl_old", "nats",
         "KL estimate between the anchor (old policy) and the current policy per token.",
         "Below 0.05.", "Higher: the step is too large, or the data too old."),
        ("policy/kl_ref", "nats", "KL estimate against the reference model per token.",
         "Grows slowly.", "Fast growth with flat eval: raise the KL coefficient."),
        ("policy/loss", "loss", "The loss that was minimised. Starts near 0 by construction.",
         "Says little: look at reward and eval.", "Only a non-finite value matters."),
        ("policy/grad_norm", "norm", "Global gradient norm before clipping, mean over updates.",
         "Steady, few spikes.", "Spikes: lower the learning rate. 0: every group is dead."),
        ("learner/learning_rate", "1", "Learning rate of the step's last update.",
         "Follows the schedule.", "Check learner.schedule and warmup_steps."),
        ("learner/optimizer_steps", "updates", "Optimiser steps since the start of the run.",
         "Grows by learner.updates_per_step.", "Grows slower: updates were skipped."),
        ("learner/microbatches", "passes", "Forward and backward passes of the step.",
         "Few.", "Many: raise learner.max_tokens_per_microbatch while memory allows."),
        ("mismatch/logprob_absdiff/{mean,max}", "nats",
         "|engine log-prob - learner log-prob| of trained tokens.",
         "Mean below 0.01 (float32: below 1e-4).",
         "Temperature, dtype or weights differ between engine and learner: do that first."),
        ("mismatch/kl", "nats", "KL estimate of the engine's against the learner's distribution.",
         "Below 0.001.", "As above; or correct with importance weights."),
        ("is/weight/{mean,max}", "ratio", "Importance weights before truncation.",
         "Mean near 1, max below 10.", "Shrink mismatch or max_staleness."),
        ("is/ess_frac", "fraction", "Effective sample size of the weights over their number.",
         "Above 0.8.", "Lower: few samples carry the step; shrink mismatch or max_staleness."),
        ("off_policy/lag/{mean,max}", "versions", "Age of the step's tokens.",
         "Max at most max_staleness; 0 in a synchronous run.", "Above the bound is a bug."),
        ("off_policy/versions_per_rollout", "versions", "Versions that sampled one completion.",
         "1, or a little more with partial rollouts.", "Many: publish less often."),
        ("off_policy/dropped", "groups", "Groups dropped in the step, for any reason.",
         "0.", "Read the reasons in logs/; often unscored samples."),
        ("queue/{requested,leased,scored}", "groups", "Groups waiting in that state.",
         "scored near 0 to one step's worth.",
         "scored full: the learner is the brake. requested full: rollout is."),
        ("time/step", "s", "The step as the learner lives it, without checkpoint and eval.", "Steady.",
         "Grows with completion length; look at the split."),
        ("time/generate", "s", "Sampling completions.", "The largest part of a step.",
         "Shorter completions, larger batches, a faster engine."),
        ("time/score", "s", "Verifying completions.", "A few percent.",
         "More reward.workers; look for slow samples."),
        ("time/wait_rollout", "s", "Learner waiting for scored groups.",
         "Small in an asynchronous run.", "Large: more rollout workers or larger max_staleness."),
        ("time/wait_learner", "s", "Rollout waiting for admission or new weights.", "Small.",
         "Large: more learner devices or a larger max_staleness."),
        ("time/learner", "s", "Old logits, forward and backward passes, updates.",
         "Comparable to generation.", "Larger micro-batches, mixed precision."),
        ("time/old_logits", "s", "Computing the anchor's log-probs.", "Below time/learner.",
         "Choose an anchor that needs no forward pass (rollout)."),
        ("time/weight_sync", "s", "Publishing weights and engines taking them.",
         "A few percent.", "Large: publish less often; check the transfer path."),
        ("time/checkpoint", "s", "Writing a checkpoint; only in steps that wrote one.", "Rare.",
         "Raise checkpoint.every_steps."),
        ("time/eval", "s", "Evaluating one held-out set; a row a set.", "Rare.",
         "Fewer samples or rows, larger evaluation.every_steps."),
        ("perf/tokens_per_s", "tokens/s", "Completion tokens trained on over time/step.",
         "Steady.", "Falls: look at the time split."),
        ("perf/tokens_per_s_per_device", "tokens/s", "The same for one device.", "Steady.",
         "Falls with more devices: waiting dominates."),
        ("perf/mfu", "fraction", "Model FLOPs of the learner over the device's peak.",
         "Above 0.3 on a GPU.", "Larger micro-batches, mixed precision."),
        ("perf/peak_mem_gb", "GB", "Peak memory of the learner's device; on CPU of the process.",
         "Below 0.9 of the device.", "Smaller max_tokens_per_microbatch, gradient_checkpointing."),
        ("eval/<set>/avg@k[_se]", "fraction", "Mean score of k samples a prompt.",
         "After is above before by more than 2 standard errors.",
         "Within noise: more rows or samples before any claim."),
        ("eval/<set>/pass@k[_se]", "fraction", "Prompts with a correct sample (evaluation.correct_at) of k, unbiased.",
         "At least its value before training.", "Falls while avg@k rises: diversity is lost."),
        ("eval/<set>/maj@k[_se]", "fraction", "Mean score of each prompt's most frequent answer.",
         "Above avg@k.", "Below: wrong answers agree with each other; look at them."),
        ("eval/<set>/length/mean", "tokens", "Mean completion length in the evaluation.",
         "As in training.", "Differs: prompts or temperature differ."),
        ("eval/<set>/truncated_frac", "fraction", "Evaluation samples cut at the limit.",
         "Below 0.05.", "Raise rollout.max_completion_tokens: the figure is a lower bound."),
        ("eval/<set>/unscored_frac", "fraction", "Evaluation samples that could not be scored.",
         "0.", "Mend the verifier: the figure leaves them out."),
        ("sft/loss", "nats", "Cross-entropy per completion token.", "Falls, then flattens.",
         "Flat from the start: learning rate or data."),
        ("sft/learning_rate", "1", "Learning rate.", "Follows the schedule.", "Check sft.schedule."),
        ("sft/grad_norm", "norm", "Global gradient norm before clipping.", "Steady.",
         "Spikes: lower sft.learning_rate."),
        ("plugin/<name>", "any", "A component's own figure; slashes allowed in the name.",
         "See that component's documentation.", "See that component's documentation."),
    )
)  # fmt: skip


def _regex(pattern: str) -> re.Pattern[str]:
    """Regular expression of the names a pattern stands for."""
    text = re.escape(pattern)
    text = re.sub(r"\\{([^}]*)\\}", lambda m: "(?:" + m[1].replace(",", "|") + ")", text)
    text = text.replace(r"\[_se\]", "(?:_se)?").replace("@k", r"@\d+")
    text = text.replace("plugin/<name>", r"plugin/\S+")
    text = text.replace("<name>", r"[^/\s]+").replace("<set>", r"[^/\s]+")
    return re.compile(text)


_COMPILED: tuple[tuple[re.Pattern[str], Metric], ...] = tuple((_regex(m.pattern), m) for m in METRICS)


@lru_cache(maxsize=4096)
def check_name(name: str) -> Metric:
    """Return the registry's entry for a metric's name.

    Raises:
        MetricError: the name is not in the registry.

    Example:
        >>> check_name("eval/gsm8k/avg@4_se").unit
        'fraction'
    """
    for regex, metric in _COMPILED:
        if regex.fullmatch(name):
            return metric
    raise MetricError(
        f"unknown metric.{nearest(name, (m.pattern for m in METRICS))}",
        key="metric",
        value=name,
        expected="a name of docs/metrics.md",
        fix="add it to rlkit/telemetry/names.py; a component from outside uses plugin/<name>",
    )


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;").replace(">", "&gt;")


def to_markdown() -> str:
    """The glossary as a Markdown page."""
    lines = [
        "# Metrics",
        "",
        "Generated by `python -m rlkit.telemetry.names`; edit `rlkit/telemetry/names.py`.",
        "",
        INTRODUCTION,
    ]
    for group, metrics in groupby(METRICS, key=lambda m: m.group):
        lines += ["", f"## {group}", "", GROUPS[group], ""]
        lines += ["| metric | unit | meaning | healthy | what to do |", "|---|---|---|---|---|"]
        for m in metrics:
            cells = (m.unit, m.meaning, m.healthy, m.action)
            lines.append(f"| `{m.pattern}` | " + " | ".join(map(_cell, cells)) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(to_markdown(), end="")
