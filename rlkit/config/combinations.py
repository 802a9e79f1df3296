"""What goes with what: rewards, budgets, advantages, losses and KL terms, and why some of them do not.

`RULES`, in combinations.yaml, is all there is: configurations are checked against it, and docs/combinations.md is made
from it. Rules read attributes of components, not names.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import reduce
from importlib.resources import files
from typing import Any

import yaml

from rlkit.config.components import import_target
from rlkit.config.schema import Config


@dataclass(frozen=True, slots=True, kw_only=True)
class Pieces:
    """The components of one configuration; None where there is none, or where it is faulty by itself."""

    advantage: Any
    loss: Any
    kl: Any
    budget: Any
    group_filter: Any
    likelihood: Any
    verdicts: int  # how many of the verifiers' rewards count in the score
    binary: bool  # one does, with weight 1, and it is 0 or 1
    scaled: bool  # the likelihood has a weight other than 1
    appeals: bool = True  # the reward that an advantage estimates from, if it does, records appeals

    def are(self, case: Mapping[str, bool]) -> bool:
        """Whether each piece or attribute of one is there and true, or not, as `case` says."""
        piece: Any = self
        found = {path: reduce(lambda part, name: getattr(part, name, None), path.split("."), piece) for path in case}
        return all(bool(found[path]) == wanted for path, wanted in case.items())


@dataclass(frozen=True, slots=True, eq=False)
class Rule:
    """What does not go together, the key that an error names, and what to do instead."""

    key: str
    when: list[dict[str, bool]]
    reason: str
    fix: str


RULES = [Rule(**rule) for rule in yaml.safe_load((files("rlkit.config") / "combinations.yaml").read_text("utf-8"))]


def pieces_of(config: Config, built: Mapping[str, Any]) -> Pieces:
    """The pieces of a configuration whose components, by key, are `built`."""
    counted = [reward for reward in config.reward.rewards.values() if reward.get("weight", 1.0) != 0]
    one = len(counted) == 1 and counted[0].get("weight", 1.0) == 1
    binary = one and getattr(import_target(counted[0]["_target_"], "reward.rewards"), "binary", False)
    names = ("advantage", "loss", "kl", "group_filter")
    found = {name: built.get(f"algorithm.{name}") for name in names} | {"budget": built.get("budget")}
    asked = config.reward.rewards.get(getattr(found["advantage"], "estimate", None) or "")
    appeals = asked is None or not asked.get("flip")
    if asked is not None:
        appeals &= getattr(import_target(asked["_target_"], "reward.rewards"), "records_appeals", False)
    found["likelihood"] = likelihood = built.get("reward.likelihood")
    scaled = getattr(likelihood, "weight", 1) != 1
    return Pieces(**found, verdicts=len(counted), binary=binary, scaled=scaled, appeals=appeals)


def broken(pieces: Pieces) -> Iterator[Rule]:
    """The rules that a configuration breaks."""
    return (rule for rule in RULES if any(pieces.are(case) for case in rule.when))
