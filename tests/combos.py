"""Every combination of the shipped rewards, budgets, advantages and losses, judged by rlkit.config.combinations.

PYTHONPATH=tests python -m combos > docs/combinations.md
"""

from __future__ import annotations

import dataclasses
import itertools
from functools import cache

from rlkit.config.combinations import RULES, Pieces, broken, pieces_of
from rlkit.config.components import build
from rlkit.config.compose import Library, load

GROUPS = {"reward": "reward", "budget": "budget", "advantage": "algorithm/advantage", "loss": "algorithm/loss"}
SKIPPED = ("math_verify", "math_verify_noisy")  # rewards of another task
Combination = tuple[str, str, str, str]
Pair = tuple[tuple[str, str], tuple[str, str]]


@cache
def choices() -> dict[str, dict[str, Pieces]]:
    """Kind -> option -> what it brings."""
    found: dict[str, dict[str, Pieces]] = {}
    for kind, group in GROUPS.items():
        for option in Library().options(group):
            if option not in SKIPPED:
                config, _ = load("quickstart", [f"{group}={option}"])
                parts = {f"algorithm.{name}": getattr(config.algorithm, name) for name in ("advantage", "loss", "kl")}
                parts |= {"budget": config.budget, "reward.likelihood": config.reward.likelihood}
                built = {key: build(part, key=key) for key, part in parts.items() if part is not None}
                found.setdefault(kind, {})[option] = pieces_of(config, built)
    return found


def pieces(combination: Combination) -> Pieces:
    """Those of the whole combination, without KL and filter."""
    reward, budget, advantage, loss = (choices()[k][c] for k, c in zip(GROUPS, combination, strict=True))
    return dataclasses.replace(
        reward, budget=budget.budget, advantage=advantage.advantage, loss=loss.loss, group_filter=None
    )


@cache
def allowed() -> dict[Combination, bool]:
    """Every combination, and whether no rule is broken."""
    return {combination: not any(broken(pieces(combination))) for combination in itertools.product(*choices().values())}


def pairs(combination: Combination) -> set[Pair]:
    """Its pairs of (kind, option)."""
    return set(itertools.combinations(zip(GROUPS, combination, strict=True), 2))


def covering() -> list[Combination]:
    """Few allowed combinations that contain every pair of choices an allowed one contains."""
    open_pairs = {pair: None for combination, good in allowed().items() if good for pair in sorted(pairs(combination))}
    candidates = [combination for combination, good in allowed().items() if good]
    chosen = []
    while open_pairs:
        best = max(candidates, key=lambda c: sum(pair in open_pairs for pair in pairs(c)))
        chosen.append(best)
        for pair in pairs(best):
            open_pairs.pop(pair, None)
    return chosen


def markdown() -> str:
    """docs/combinations.md."""
    good = {pair for combination, ok in allowed().items() if ok for pair in pairs(combination)}
    lines = [
        "# What goes with what",
        "",
        "Generated from `rlkit.config.combinations` (`PYTHONPATH=tests python -m combos > docs/combinations.md`). A",
        "configuration that breaks a rule is refused before anything starts, with the reason. A test runs two steps of",
        "every pair marked `+`, in some combination that is allowed.",
        "",
        "| key | refused because | instead |",
        "|---|---|---|",
        *(f"| `{rule.key}` | {rule.reason} | {rule.fix} |" for rule in RULES),
        "",
        "`+`: there is an allowed combination with both; an empty cell: there is none. The reward `chain_sum` stands",
        "for every verifier with partial scores, `chain_sum_noisy` for every verifier of right and wrong.",
    ]
    for (first, rows), (second, columns) in itertools.combinations(choices().items(), 2):
        lines += [
            "",
            f"## {first.capitalize()} and {second}",
            "",
            f"| | {' | '.join(columns)} |",
            "|---" * (1 + len(columns)) + "|",
        ]
        for row in rows:
            cells = ["+" if ((first, row), (second, column)) in good else "" for column in columns]
            lines.append(f"| {row} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(markdown(), end="")
