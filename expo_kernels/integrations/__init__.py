"""The loss inside other trainers: one thin file each, which adapts names and holds no arithmetic.

`liger` needs only PyTorch; `trl` and `verl` need the library of that name.
"""
