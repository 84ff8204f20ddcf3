"""`python -m expo.ablation --out DIR` runs the ablation; the code is in `expo/experiments/ablation/`."""

import signal
import sys

from expo.experiments.ablation.command import main

__all__ = ["main"]

if __name__ == "__main__":
    # SIGTERM acts like Ctrl-C, so that the training runs are asked to save a checkpoint and stop as well
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    sys.exit(main())
