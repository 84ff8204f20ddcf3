"""The report of a run: its records read back, figures, and the HTML page."""
