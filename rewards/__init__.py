"""Verifiable rewards: named, weighted reward functions, scored in confined, killable processes."""

from rewards.base import RewardError, Sample, Score, Unscorable
from rewards.pool import VerifierPool
from rewards.spec import build, import_target

__all__ = ["RewardError", "Sample", "Score", "Unscorable", "VerifierPool", "build", "import_target"]
