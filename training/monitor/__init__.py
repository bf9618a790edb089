"""Monitoring of a run: progress, MFU, divergence, gradient noise scale and plots."""
