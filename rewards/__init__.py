"""Verifiable rewards: named, weighted reward functions, scored in confined, killable processes."""

from rewards.base import RewardError, Sample, Score, Unscorable, nearest
from rewards.pool import VerifierPool
from rewards.spec import RewardSet, build, check_spec, import_target

__all__ = ["RewardError", "RewardSet", "Sample", "Score", "Unscorable", "VerifierPool"]
__all__ += ["build", "check_spec", "import_target", "nearest"]
