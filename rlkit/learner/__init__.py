"""The learner: forward, batching, updates, checkpoints, the training loop and the warm start."""
