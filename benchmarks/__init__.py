"""Measure the kit side by side with the alternatives: `python -m benchmarks`."""
