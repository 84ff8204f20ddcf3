"""Benchmarks of the kernels and the trainer against other implementations."""
