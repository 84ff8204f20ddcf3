"""`python -m expo.ablation.page DIR PAGE.md` puts the results of an ablation into a Markdown page."""

import sys

from expo.experiments.ablation.page import main

__all__ = ["main"]

if __name__ == "__main__":
    sys.exit(main())
