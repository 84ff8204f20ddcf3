"""A run: how it is set up, its folder, metrics, checkpoints and trackers."""
