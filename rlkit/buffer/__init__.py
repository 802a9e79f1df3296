"""The versioned buffer between rollout workers and learner: protocol.py, docs/buffer.md."""
