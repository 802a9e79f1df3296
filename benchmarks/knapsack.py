"""Time of the knapsack allocation, and of the history query it needs, as JSON.

    python benchmarks/knapsack.py [--prompts 4096] [--rollouts 32768] [--epochs 4] [--repeats 30]

Pass rates are of 16 draws at rates from Beta(0.5, 0.5): many solved and unsolved prompts ("mixed"), or uniform in
(0, 1): all effective, the largest problem. The history is that of `epochs` earlier groups of every prompt in a SQLite
buffer on this disk. Seconds: median, minimum and maximum of the repeats.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from sqlalchemy import insert

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from rlkit.budget.knapsack import KnapsackBudget, allocate
from rlkit.buffer.payloads import encode
from rlkit.buffer.sql import SqlBuffer
from rlkit.buffer.tables import groups


def timed(call: Callable[[], object], repeats: int) -> dict[str, float]:
    call()
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return {"median_s": statistics.median(seconds), "min_s": min(seconds), "max_s": max(seconds)}


def with_history(
    buffer: SqlBuffer, names: list[str], epochs: int, rates: np.ndarray, draw: np.random.Generator
) -> None:
    """Rows as `take` leaves them, of groups of 8."""
    rows = []
    for ordinal in range(epochs * len(names)):
        scores = draw.random(8) < rates[ordinal % len(names)]
        outcomes = encode([(float(x), 1000) for x in scores], "scores")
        row = {"ordinal": ordinal, "state": "trained", "samples": 8, "prompt_id": names[ordinal % len(names)]}
        rows.append(row | {"min_version": 0, "requested_at": 0.0, "outcomes": outcomes})
    with buffer._db.write() as connection:
        connection.execute(insert(groups), rows)


def main() -> None:
    parser = argparse.ArgumentParser()
    for name, default in (("prompts", 4096), ("rollouts", 32768), ("epochs", 4), ("repeats", 30)):
        parser.add_argument(f"--{name}", type=int, default=default)
    given = parser.parse_args()
    draw = np.random.default_rng(0)
    hidden = draw.beta(0.5, 0.5, given.prompts)
    problems = {
        "mixed": (draw.binomial(16, hidden) / 16).tolist(),
        "all_effective": draw.uniform(0.001, 0.999, given.prompts).tolist(),
    }
    result: dict[str, object] = dict(vars(given))
    for name, rates in problems.items():
        result[name] = timed(lambda rates=rates: allocate(rates, given.rollouts), given.repeats)
    with tempfile.TemporaryDirectory() as folder:
        buffer = SqlBuffer(
            f"sqlite:///{folder}/buffer.db", payload_dir=f"{folder}/payloads", prompts_per_step=given.prompts,
            max_staleness=0, slice_samples=64,
        )  # fmt: skip
        names = [f"prompt/{i}" for i in range(given.prompts)]
        with_history(buffer, names, given.epochs, hidden, draw)
        result["history"] = timed(lambda: buffer.history(names, 16), given.repeats)
        budget = KnapsackBudget()
        whole = timed(
            lambda: budget(names, given.rollouts, lambda latest: buffer.history(names, latest)), given.repeats
        )
        result["budget_with_history"] = whole
        buffer.close()
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
