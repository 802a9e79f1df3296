"""Recipes: Hydra YAML, one file per experiment, groups in folders; the quickstart's teacher. Shipped."""
