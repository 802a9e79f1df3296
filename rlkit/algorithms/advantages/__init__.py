"""Advantages: scores of a step's samples -> one number a sequence. One method a file."""
