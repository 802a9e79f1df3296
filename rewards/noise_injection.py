"""Verifier errors at known rates, and appeals against a rule's: the study of arXiv 2510.00915."""

import math
import mmap
import random
from collections.abc import Mapping
from typing import Any

from rewards.base import RewardError, Sample, Unscorable
from rewards.spec import build


class Judge:
    """A reward that others wrap, as right or wrong: a score of `correct_at` or more. Raises RewardError as `build`."""

    binary = True

    def __init__(self, reward: Mapping[str, Any], correct_at: float, seed: int = 0, **rates: float) -> None:
        if wrong := {name: rate for name, rate in rates.items() if not 0 <= rate <= 1}:
            raise RewardError(f"{wrong} must be from 0 to 1")
        if not math.isfinite(correct_at):  # TypeError for what is no number, which `build` reports
            raise RewardError(f"correct_at={correct_at} must be a finite number")
        self._inner = build({"inner": {**reward, "weight": 1.0}})  # what it weighs in the total does not count here
        self._correct_at, self._seed, self._rates, self.bounds = correct_at, seed, list(rates.values()), (0.0, 1.0)
        self.answer = getattr(self._inner.functions[0], "answer", None)
        self.warm_up = getattr(self._inner.functions[0], "warm_up", lambda: None)

    def right(self, sample: Sample) -> bool:
        """Raises Unscorable, with the reward's reason."""
        measured = self._inner.measure(sample)
        if (score := measured.parts["inner"]) is None:
            raise Unscorable(measured.reasons["inner"])
        return score >= self._correct_at

    def happens(self, rate: float, sample: Sample) -> bool:
        """True with probability `rate`, fixed by seed, sample and its place in the run, in any process."""
        text = repr((type(self).__name__, self._seed, sample.key, sample.prompt, sample.completion))
        return random.Random(text).random() < rate


class NoiseInjection(Judge):
    """1.0 or 0.0 as `reward` finds a sample right or wrong, each with an error of its own; the unscored stays so."""

    def __init__(
        self, reward: Mapping[str, Any], false_positive_rate: float, false_negative_rate: float, seed: int = 0,
        correct_at: float = 1.0,
    ) -> None:  # fmt: skip
        rates = {"false_positive_rate": false_positive_rate, "false_negative_rate": false_negative_rate}
        super().__init__(reward, correct_at, seed, **rates)

    def __call__(self, sample: Sample) -> float:
        right = self.right(sample)
        return float(right != self.happens(self._rates[right], sample))


class Appeals(Judge):
    """Of the samples `rule` finds wrong, a fraction drawn by `seed` goes to `appeal`: 1.0 overturned, 0.0 upheld, None
    not asked. Listed with weight 0 beside the rule, it lets an advantage estimate the rule's false negatives.

    flip: the verdict after appeal instead, to be the score. max_calls: no appeal past it; counted over all verifier
    processes, for held-out samples too, anew after a restart.
    """

    records_appeals = True  # what an advantage that estimates from it needs

    def __init__(
        self, rule: Mapping[str, Any], appeal: Mapping[str, Any], fraction: float = 0.1, seed: int = 0,
        max_calls: int | None = None, flip: bool = False, correct_at: float = 1.0,
    ) -> None:  # fmt: skip
        super().__init__(rule, correct_at, seed, fraction=fraction)
        if max_calls is not None and not max_calls >= 0:
            raise RewardError(f"max_calls={max_calls} must be null, or 0 and above")
        self._appeal, self._max_calls, self._flip = Judge(appeal, correct_at), max_calls, flip
        self._calls = mmap.mmap(-1, 8)  # shared with the processes forked of this one
        self.warm_up = lambda own=self.warm_up: (own(), self._appeal.warm_up())

    def __call__(self, sample: Sample) -> float:
        right, made = self.right(sample), int.from_bytes(self._calls[:8], "big")
        may_ask = not right and (self._max_calls is None or made < self._max_calls)
        if may_ask and self.happens(self._rates[0], sample):
            self._calls[:8] = (made + 1).to_bytes(8, "big")
            return float(self._appeal.right(sample))
        if self._flip:
            return float(right)
        raise Unscorable("found right, or not asked")
