"""Whether a run can start here or on a TPU: this machine, the compiled program, the estimate."""
