"""The checks of `python -m benchmarks.gpu_check`, one module per subject."""
