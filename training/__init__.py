"""The training program: distribution strategy, training loop, checkpoints and monitoring."""
