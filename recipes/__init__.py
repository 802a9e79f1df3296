"""Recipes: Hydra YAML, one file per experiment, groups in folders. Shipped with the package."""
