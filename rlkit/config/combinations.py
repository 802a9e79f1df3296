"""What goes with what: rewards, budgets, advantages, losses and KL terms, and why some of them do not.

`RULES` is all there is: configurations are checked against it, and docs/combinations.md is made from it. Rules read
attributes of components, not names.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

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
    appeals: bool = True  # the reward that an advantage estimates from, if it does, records appeals

    def are(self, piece: str, *attributes: str) -> bool:
        """Whether a piece is there and has one of these attributes true."""
        return any(getattr(getattr(self, piece), attribute, False) for attribute in attributes)


@dataclass(frozen=True, slots=True)
class Rule:
    """What does not go together, the key that an error names, and what to do instead."""

    key: str
    broken: Callable[[Pieces], bool]
    reason: str
    fix: str


RULES = (
    Rule(
        "algorithm.advantage", lambda p: p.are("loss", "whole_groups") and not p.are("advantage", "centred_in_group"),
        "this loss takes the advantage's sign as right or wrong within a prompt", "algorithm/advantage=mean_centred",
    ),
    Rule(
        "algorithm.kl", lambda p: p.are("loss", "whole_groups") and p.are("kl", "in_reward"),
        "a KL in the reward gives both signs to answers that are all wrong", "algorithm/kl=none or reference",
    ),
    Rule(
        "algorithm.kl", lambda p: p.are("advantage", "needs_verdicts", "log_scores") and p.are("kl", "in_reward"),
        "this advantage needs scores with nothing taken off", "algorithm/kl=none or reference",
    ),
    Rule(
        "reward.likelihood", lambda p: p.likelihood is not None and p.are("advantage", "needs_verdicts"),
        "this advantage is made for verdicts, and a likelihood is none", "algorithm/advantage=leave_one_out",
    ),
    Rule(
        "reward.likelihood", lambda p: p.likelihood is not None and p.are("loss", "whole_groups"),
        "this loss takes scores as labels, and a likelihood is none", "algorithm/loss=policy_gradient",
    ),
    Rule(
        "budget", lambda p: p.likelihood is not None and p.are("budget", "needs_verdicts"),
        "this budget follows pass rates, and likelihoods have none", "budget=uniform",
    ),
    Rule(
        "algorithm.group_filter", lambda p: p.likelihood is not None and p.group_filter is not None,
        "it would see scores without the likelihoods, which come later", "algorithm.group_filter=null",
    ),
    Rule(
        "algorithm.group_filter", lambda p: p.group_filter is not None and p.are("advantage", "uses_uniform_groups"),
        "this advantage learns from groups of one verdict too", "algorithm.group_filter=null",
    ),
    Rule(
        "algorithm.advantage", lambda p: p.are("likelihood", "log_scores") != p.are("advantage", "log_scores"),
        "log-likelihoods of a group and the advantage that averages them go together only",
        "reward=jepo with algorithm=jepo, or neither",
    ),
    Rule(
        "reward.likelihood",
        lambda p: p.are("likelihood", "log_scores")
        and (p.verdicts > 0 or p.likelihood.weight != 1 or p.are("likelihood", "length_reward", "subtract_no_chain")),
        "the scores must be log-likelihoods and nothing else",
        "weight 1, length_reward 0, subtract_no_chain false, verifiers of weight 0",
    ),
    Rule(
        "reward.rewards", lambda p: p.are("advantage", "needs_binary_scores") and not p.binary,
        "this advantage corrects one reward's verdicts of 0 and 1",
        "one reward of weight 1 whose class says `binary = True`; NoiseInjection makes one of any",
    ),
    Rule(
        "algorithm.advantage", lambda p: not p.appeals, "what this advantage estimates from does not record appeals",
        "a reward whose class says `records_appeals = True`: rewards.noise_injection.Appeals, flip=false",
    ),
)  # fmt: skip


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
    found |= {"likelihood": built.get("reward.likelihood")}
    return Pieces(**found, verdicts=len(counted), binary=binary, appeals=appeals)


def broken(pieces: Pieces) -> Iterator[Rule]:
    """The rules that a configuration breaks."""
    return (rule for rule in RULES if rule.broken(pieces))
