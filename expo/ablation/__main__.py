"""`python -m expo.ablation --out DIR` runs the ablation; the code is in `expo/experiments/ablation/`."""

import signal
import sys
from collections.abc import Sequence

from expo.experiments.ablation import command
from expo.experiments.ablation.plan import PROGRAM

__all__ = ["main"]


def main(argv: Sequence[str] | None = None, prog: str = PROGRAM) -> int:
    """The command line of `prog`, as `expo.experiments.ablation.command.main`."""
    # SIGTERM acts like Ctrl-C, so that the training runs are asked to save a checkpoint and stop as well
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    return command.main(argv, prog)


if __name__ == "__main__":
    sys.exit(main())
