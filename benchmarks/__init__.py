"""Benchmarks: ratios taken in one run, and what they are taken of."""
