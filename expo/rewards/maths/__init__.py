"""Mathematical answers: from text to kinds, and the comparison of kinds.

In the order of a comparison: `dressing` takes off markup, `parse` makes an answer of a `kinds` class with the help of
`relations`, `regions`, `scalars`, `units` and `formula`, and `compare` compares two of them by `surds` and `values` in
the trainer's process and by `algebra` in the workers; `forms` tells values from operations.
"""
