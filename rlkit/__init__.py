"""rlkit: reinforcement learning with verifiable rewards for reasoning LLMs."""

__version__ = "0.1.0"
