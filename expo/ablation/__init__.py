"""The commands of the ablation: `python -m expo.ablation` and `python -m expo.ablation.page`."""
