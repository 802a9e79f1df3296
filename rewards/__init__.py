"""Verifiable rewards: named, weighted reward functions, scored in confined, killable processes."""

from rewards.base import Reward, RewardError, Sample, Score, Unscorable, nearest
from rewards.pool import VerifierPool
from rewards.spec import RewardSet, build, check_spec

__all__ = [
    "Reward",
    "RewardError",
    "RewardSet",
    "Sample",
    "Score",
    "Unscorable",
    "VerifierPool",
    "build",
    "check_spec",
    "nearest",
]
