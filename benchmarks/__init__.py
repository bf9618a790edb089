"""Side-by-side timings. pytest never runs them: it checks correctness, not speed."""
