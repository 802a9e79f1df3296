"""Rollouts: the engine protocol, the embedded engine, and the worker that drives them."""
