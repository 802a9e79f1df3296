"""The versioned buffer between rollout workers and learner: sql.py, docs/buffer.md."""
