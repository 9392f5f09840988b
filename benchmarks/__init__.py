"""Benchmarks: scripts, and the suite of experiments (``python -m benchmarks``)."""
