"""Benchmarks: ratios within one run, beside what they must beat. `make bench` writes docs/benchmarks.md."""
