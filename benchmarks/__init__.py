"""Benchmarks: what was measured, on which machine, losses included."""
