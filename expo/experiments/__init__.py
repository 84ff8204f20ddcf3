"""Experiments: the ablation of the method, and a real language model that needs no hub."""
