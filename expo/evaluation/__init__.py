"""What `python -m expo.evaluate` is made of: its command line, the model it samples from, its records, comparisons."""
