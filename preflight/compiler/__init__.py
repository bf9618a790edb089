"""Training steps lowered and compiled for TPUs in child processes, and what the result says."""
