"""Measured speed, against peers in the same run: what `jobs/benchmark.py` runs and BENCHMARKS.md prints."""
