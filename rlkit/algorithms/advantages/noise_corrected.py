"""Corrections for a binary verifier that errs (arXiv 2510.00915), as advantages: normalising would undo them.

Of the truth R* it reports R, with rho0 = P(R = 1 | R* = 0), rho1 = P(R = 0 | R* = 1), rho0 + rho1 < 1:

    backward   A_i = (Rhat_i - mean of the others' Rhat) / s,    Rhat = (R - rho0) / (1 - rho0 - rho1)
    forward    A_i = (R_i - (1 - rho1)) / s,                     no baseline

rho1 may be estimated from appeals, second verdicts on a share of what was found wrong (a = 1e-5):

    FN = overturned / asked * found wrong,    rho1 <- decay rho1 + (1 - decay) (FN + a) / (FN + found right + 2 a)
"""

from dataclasses import field, replace

import torch
from torch import Tensor

from rlkit.algorithms.advantages.rloo import LeaveOneOutAdvantage
from rlkit.algorithms.base import AdvantageInputs
from rlkit.errors import ConfigError, TrainingError
from rlkit.settings import Checked, choice, number


class NoiseCorrected(Checked, kw_only=True):
    """What both share. Scores other than 0 and 1: TrainingError.

    estimate: the reward that records appeals: 1 overturned, 0 upheld, NaN not asked. Without evidence rho1 stays.
    false_negative_rate: rho1; with `estimate` its start, or null: the first step's estimate (0 before there is one).
    """

    minimum_group_size = 1
    needs_verdicts = True
    needs_binary_scores = True
    false_positive_rate: float = number(0.0, 0, 1)
    false_negative_rate: float | None = number(None, 0, 1)
    estimate: str | None = None
    decay: float = number(0.9, 0, 1)
    minimum_divisor: float = number(0.05, 1e-6, 1)  # an estimate may come near 1 - rho0
    state: dict[str, float] = field(default_factory=dict, init=False, compare=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        rates = self.false_positive_rate, self.false_negative_rate
        if (rates[1] is None and self.estimate is None) or sum(filter(None, rates)) >= 1:
            expected = "a sum below 1; null only for the second, with estimate"
            raise ConfigError("no such rates", key="false_{positive,negative}_rate", value=rates, expected=expected)

    @property
    def rho1(self) -> float:
        """The false negative rate in use."""
        return self.state.get("false_negative_rate", self.false_negative_rate or 0.0)

    def observe(self, inputs: AdvantageInputs) -> dict[str, float]:
        """Move rho1; return it, and how far the advantages are from leave-one-out's."""
        if other := sorted(set(inputs.scores.tolist()) - {0.0, 1.0}):
            raise TrainingError("not a verdict", key="scores", value=other[:3], expected="0 or 1", fix="another reward")
        if self.estimate is not None:
            self._move(inputs.scores, inputs.parts[self.estimate])
        mine, plain = self(inputs), LeaveOneOutAdvantage()(inputs)  # type: ignore[operator]  # it is a subclass
        found = {"false_negative_rate": self.rho1, "max_absdiff": float((mine - plain).abs().max())}
        if norms := float(mine.norm() * plain.norm()):
            found["cosine"] = float(mine @ plain) / norms
        return {f"advantage/correction/{name}": value for name, value in found.items()}

    def _move(self, scores: Tensor, appeals: Tensor) -> None:
        asked, overturned = int((~appeals.isnan()).sum()), int((appeals == 1).sum())
        wrong = int(((scores == 0) | (appeals == 1)).sum())  # overturned ones may have been given their point already
        missed, right = overturned / max(asked, 1) * wrong, len(scores) - wrong
        if (asked or not wrong) and missed + right:
            share = (missed + 1e-5) / (missed + right + 2e-5)
            decay = self.decay if self.state or self.false_negative_rate is not None else 0.0
            self.state["false_negative_rate"] = decay * self.rho1 + (1 - decay) * share


class Backward(NoiseCorrected):
    """scale is s. A group of 1 has baseline 0; in others A is leave-one-out's over (1 - rho0 - rho1) s."""

    scale: float = number(1.0, 1e-6)

    def __call__(self, inputs: AdvantageInputs) -> Tensor:
        """scores [N] of 0 and 1, group [N] -> advantages [N]."""
        youden = max(1 - self.false_positive_rate - self.rho1, self.minimum_divisor)
        corrected = (inputs.scores - self.false_positive_rate) / youden
        centred = LeaveOneOutAdvantage()(replace(inputs, scores=corrected))
        return torch.where(inputs.group.bincount()[inputs.group] == 1, corrected, centred) / self.scale


class Forward(NoiseCorrected):
    """scale names s: one, sensitivity (1 - rho1), or youden (1 - rho0 - rho1), with which alone rho0 counts."""

    uses_uniform_groups = True
    scale: str = choice("one", "sensitivity", "youden")

    def __call__(self, inputs: AdvantageInputs) -> Tensor:
        """scores [N] of 0 and 1 -> advantages [N]: rho1 / s for 1, (rho1 - 1) / s for 0."""
        sensitivity = 1 - self.rho1
        scales = {"one": 1.0, "sensitivity": sensitivity, "youden": sensitivity - self.false_positive_rate}
        return (inputs.scores - sensitivity) / max(scales[self.scale], self.minimum_divisor)
