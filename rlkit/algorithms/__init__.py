"""Algorithms as compositions: advantage x loss x aggregation x KL, pure functions on tensors."""
