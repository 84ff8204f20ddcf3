"""The parts of `python -m expo.evaluate`: command line, frozen policy, scores, files of results, comparison."""
