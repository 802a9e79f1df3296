"""Losses: log-probs, anchor and advantages -> loss of every token. One method a file."""
