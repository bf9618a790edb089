"""Side-by-side timings. Never run by pytest: speed is measured here, correctness there."""
