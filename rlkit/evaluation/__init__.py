"""Evaluation: avg@k, unbiased pass@k and maj@k with standard errors."""
