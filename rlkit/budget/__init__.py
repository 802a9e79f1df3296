"""Budgets: how many rollouts each prompt of a step gets."""
