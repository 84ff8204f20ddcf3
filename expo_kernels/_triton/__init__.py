"""The same numbers by Triton kernels; imported only where they run, so that the package needs no driver."""
