"""EXPO: GRPO with accuracy-conditioned KL and Gaussian curriculum sampling, on real models."""
