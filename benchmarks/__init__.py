"""Benchmarks: each is one command, takes turns with its rivals, and keeps its raw samples in `results/`."""
