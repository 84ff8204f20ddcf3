"""The loss inside other people's trainers: one thin file each, which adapts names and holds no arithmetic.

`liger` needs PyTorch alone; `trl` and `verl` import their host when they are imported themselves.
"""
