"""The ablation in one command: `python -m expo.ablation --out DIR`. Source: `expo/experiments/ablation/`."""

import sys

from expo.experiments.ablation.__main__ import main

__all__ = ["main"]

if __name__ == "__main__":
    sys.exit(main())
