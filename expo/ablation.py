"""The ablation in one command: `python -m expo.ablation --out DIR`. Source: `expo/experiments/ablation/`."""

import signal
import sys

from expo.experiments.ablation.command import main

__all__ = ["main"]

if __name__ == "__main__":
    # an interrupt, so that the runs under way are asked to save and end as well
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    sys.exit(main())
