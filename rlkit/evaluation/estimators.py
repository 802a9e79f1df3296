"""avg@k, pass@k and maj@k of a held-out set, with standard errors.

Samples of one prompt are not independent evidence about the set: a standard error is the standard deviation (n - 1) of
the prompts' values over the root of their number.
"""

from collections import Counter
from collections.abc import Sequence
from math import comb, exp, log, sqrt
from statistics import fmean, stdev

import numpy as np
from numpy.typing import NDArray

from rlkit.types import Verdict


def estimate(values: Sequence[float]) -> tuple[float, float]:
    """Mean and standard error of per-prompt values; NaN where there are none, or one for the error."""
    n, nan = len(values), float("nan")
    return fmean(values) if n else nan, stdev(values) / sqrt(n) if n > 1 else nan


def pass_at_k(samples: int, correct: int, k: int) -> float:
    """Probability that k of the n samples, drawn without replacement, hold a correct one.

    1 - C(n - c, k) / C(n, k): the unbiased estimator of Chen et al. 2021 (arXiv 2107.03374, eq. 1).
    """
    return 1.0 - comb(samples - correct, k) / comb(samples, k)


def majority_score(verdicts: Sequence[Verdict], score: Sequence[float]) -> float:
    """Score of the most frequent extracted answer; the mean over answers where several tie.

    Samples without an answer do not vote; with no vote the score is 0: a policy that never answers is wrong.
    """
    votes = Counter(v.answer for v in verdicts if v.answer is not None)
    winners = [answer for answer, count in votes.items() if count == max(votes.values())]
    means = [fmean(s for v, s in zip(verdicts, score, strict=True) if v.answer == winner) for winner in winners]
    return fmean(means) if means else 0.0


def summarise(
    verdicts_by_prompt: Sequence[Sequence[Verdict]], *, samples: int, correct_at: float, part: str | None = None
) -> dict[str, tuple[float, float]]:
    """{"avg@k", "pass@1", "pass@2", ..., "pass@k", "maj@k"} over the prompts of a set, each with its standard error.

    A score is the named part or the total. Unscored samples are left out; a prompt that lost samples counts with the
    rest in avg@k only: the others depend on the number of samples. "Correct": at least `correct_at`, up to rounding.
    """
    ks = sorted({2**j for j in range(samples.bit_length())} | {samples})
    values: dict[str, list[float]] = {f"avg@{samples}": [], **{f"pass@{k}": [] for k in ks}, f"maj@{samples}": []}
    for verdicts in verdicts_by_prompt:
        scored = [v for v in verdicts if v.score is not None]
        raw = [v.score if part is None else v.parts.get(part) for v in scored]
        score = [s for s in raw if s is not None]
        if score:
            values[f"avg@{samples}"].append(fmean(score))
        if score and len(score) == samples:
            for k in ks:
                values[f"pass@{k}"].append(pass_at_k(samples, sum(s >= correct_at - 1e-9 for s in score), k))
            values[f"maj@{samples}"].append(majority_score(scored, score))
    return {name: estimate(v) for name, v in values.items()}


def summarise_references(
    logprobs: NDArray[np.float64], tokens: NDArray[np.int64], lengths: NDArray[np.int64]
) -> dict[str, tuple[float, float]]:
    """Likelihood of the references of P prompts behind k sampled chains each, with standard errors.

    logprobs [P, k]: log pi(a* | p, z) in nats; tokens [P] of the references; lengths [P, k] of the chains.
    `logprob@n` is log mean_n pi(a* | p, z), a biased-low estimate of log pi(a* | p), at n = 1 and k; `token_logprob` is
    all log-prob over all tokens; `perplexity` exp(-logprob@1): arXiv 2602.03979. Both errors are linearised.
    """
    k, means = logprobs.shape[1], logprobs.mean(1)
    mean, error = estimate(means.tolist())
    perplexity = exp(min(-mean, 700.0))  # e^709 is the largest double
    a_token = float(means.sum() / tokens.sum())
    return {
        f"logprob@{k}": estimate((np.logaddexp.reduce(logprobs, axis=1) - log(k)).tolist()),
        "logprob@1": (mean, error),
        "token_logprob": (a_token, estimate(((means - a_token * tokens) / tokens.mean()).tolist())[1]),
        "perplexity": (perplexity, perplexity * error),
        "chain_length": estimate(lengths.mean(1).tolist()),
    }
