"""The training program around the optimizers: strategy, loop, checkpoints, export."""
