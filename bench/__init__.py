"""Benchmarks: one file per op and one per system. `python -m bench.linear_logprob --help`."""
