"""The Triton backend; imported only if its kernels run, so that the package needs no GPU driver."""
