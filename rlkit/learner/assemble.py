"""From taken groups to a step's training sequences: scores, advantages and what to report of them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch

from rlkit.algorithms.base import Advantage, AdvantageInputs, constant_groups
from rlkit.errors import TrainingError, calling
from rlkit.learner.batching import TrainingSequence
from rlkit.types import BoolArray, Group, Rollout, Verdict


def usable_samples(group: Group) -> list[tuple[Rollout, Verdict]]:
    """Samples of a group that have a score and at least one token in the loss."""
    pairs = zip(group.rollouts, group.verdicts, strict=True)
    return [(r, v) for r, v in pairs if v.score is not None and r.loss_mask.any()]


def assemble(
    groups: Sequence[Group], advantage: Advantage, step: int, steps_of: Mapping[int, int], *,
    penalties: Callable[..., tuple[torch.Tensor, dict[str, float]]] | None = None, mask_truncated: bool = False,
    made: Sequence[TrainingSequence] = (),
) -> tuple[list[TrainingSequence], dict[str, float]]:  # fmt: skip
    """Scored samples of `groups` -> sequences with advantages, and metrics of rewards and groups.

    `penalties` gives what is taken off each score before the advantage, and its metrics; reported rewards are without.
    `steps_of`: step of every version that sampled; a token's lag is `step` minus that. Unscored samples are in no mean;
    groups must hold `advantage.minimum_group_size` others. With `mask_truncated` completions cut at the limit count in
    the advantages and metrics, in no denominator; of a group whose completions are all cut, one stays with advantage 0.
    `made`: what takes the place of the usable rollouts, in their order; then no score is a verdict, or "correct".
    """
    usable = [(number, g, r, v) for number, g in enumerate(groups) for r, v in usable_samples(g)]
    sequences = made or [TrainingSequence.of(g.prompt, r) for _, g, r, _ in usable]
    parts: dict[str, list[float]] = {}
    for _, _, _, verdict in usable:
        for name, value in verdict.parts.items():
            parts.setdefault(name, []).append(float("nan") if value is None else value)
    inputs = AdvantageInputs(
        scores=torch.tensor([v.score for _, _, _, v in usable], dtype=torch.float64),
        group=torch.tensor([number for number, _, _, _ in usable], dtype=torch.int64),
        lengths=torch.tensor([s.loss_tokens for s in sequences], dtype=torch.float64),
        parts={k: torch.tensor(v, dtype=torch.float64) for k, v in parts.items() if len(v) == len(usable)},
    )
    penalty, measured = penalties(sequences) if penalties else (torch.zeros_like(inputs.scores), {})
    key = "algorithm.advantage"
    with calling(advantage, key, "mend it, or choose a shipped one: algorithm/advantage=group_normalized"):
        judged = replace(inputs, scores=inputs.scores - penalty)
        measured |= getattr(advantage, "observe", lambda _: {})(judged)
        advantages = advantage(judged)
    shape = advantages.shape if isinstance(advantages, torch.Tensor) else None
    if shape != inputs.scores.shape or not torch.isfinite(advantages).all():
        got = type(advantages).__name__ if shape is None else f"shape {tuple(shape)}"
        problem = "the advantage must give one finite number a sequence"
        expected = f"a tensor of shape {tuple(inputs.scores.shape)}, finite; got {got}"
        raise TrainingError(problem, key=key, value=type(advantage).__name__, expected=expected)
    spans = [(s.end - s.start, step - steps_of[s.version]) for g in groups for r in g.rollouts for s in r.version_spans]
    metrics = _metrics(groups, inputs, advantages) | measured
    if made:
        metrics = {k: v for k, v in metrics.items() if not k.startswith("group/all_")}
    metrics["off_policy/lag/mean"] = sum(n * lag for n, lag in spans) / sum(n for n, _ in spans)
    metrics["off_policy/lag/max"] = float(max(lag for _, lag in spans))
    fresh = [_fresh(s, r, step, steps_of) for s, (_, _, r, _) in zip(sequences, usable, strict=True)]
    trained = [replace(s, advantage=float(a), fresh=f) for s, a, f in zip(sequences, advantages, fresh, strict=True)]
    if mask_truncated:
        ends = zip(trained, (r for _, _, r, _ in usable), strict=True)
        # What ends before the rollout does, at a delimiter, was not cut by the limit.
        whole = [s for s, r in ends if r.finish_reason != "length" or s.loss_tokens < r.loss_mask.sum()]
        left = {s.group: replace(s, advantage=0.0) for s in trained if s.group not in {x.group for x in whole}}
        trained = [*whole, *left.values()]
    return trained, metrics


def _fresh(sequence: TrainingSequence, rollout: Rollout, step: int, steps_of: Mapping[int, int]) -> BoolArray | None:
    """Which tokens the newest weights sampled; of an answer that nobody sampled, none."""
    if all(steps_of[span.version] == step for span in rollout.version_spans):
        return None
    fresh = np.zeros(len(sequence.token_ids), np.bool_)
    for span in rollout.version_spans:
        fresh[span.start : min(span.end, sequence.answer_start)] = steps_of[span.version] == step
    return fresh


def _metrics(groups: Sequence[Group], inputs: AdvantageInputs, advantages: torch.Tensor) -> dict[str, float]:
    verdicts, rollouts = [v for g in groups for v in g.verdicts], [r for g in groups for r in g.rollouts]
    scores = inputs.scores
    constant = constant_groups(scores, inputs.group, len(groups))
    first = torch.zeros(len(groups), dtype=scores.dtype).scatter_(0, inputs.group, scores)
    lengths = np.array([len(r.token_ids) for r in rollouts])
    sizes = np.array([len(g.rollouts) for g in groups])
    return {
        "reward/mean": float(scores.mean()),
        "reward/std": float(scores.std(correction=0)),
        "reward/unscored_frac": float(np.mean([v.score is None for v in verdicts])),
        "reward/timeout_frac": float(np.mean([v.reason == "timeout" for v in verdicts])),
        "group/dead_frac": float(constant.double().mean()),
        "group/all_correct_frac": float((constant & (first > 0)).double().mean()),
        "group/all_wrong_frac": float((constant & (first <= 0)).double().mean()),
        "group/size/mean": float(sizes.mean()),
        "group/size/max": float(sizes.max()),
        "advantage/mean": float(advantages.mean()),
        "advantage/std": float(advantages.std(correction=0)),
        "advantage/abs_max": float(advantages.abs().max()),
        "advantage/nonzero_frac": float((advantages != 0).double().mean()),
        "completion/length/mean": float(lengths.mean()),
        "completion/length/min": float(lengths.min()),
        "completion/length/max": float(lengths.max()),
        "completion/truncated_frac": float(np.mean([r.finish_reason == "length" for r in rollouts])),
        "off_policy/versions_per_rollout": float(np.mean([len(r.version_spans) for r in rollouts])),
        **{f"reward/{name}/mean": float(values.nanmean()) for name, values in inputs.parts.items()},
    }
