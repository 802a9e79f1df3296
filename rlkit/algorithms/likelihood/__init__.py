"""Rewards from the likelihood of the reference answer behind a sampled chain of thought. One method a file."""
