"""The messages between the trainer and the verifier's worker processes."""

from typing import Final

READY: Final = b"ready"
DONE: Final = b"done"
CORRECT: Final = b"correct"
WRONG: Final = b"wrong"
UNEVALUATED: Final = b"unevaluated"
UNPARSED: Final = b"unparsed"
TIMEOUT: Final = b"timeout"
BAD_GOLD: Final = b"bad gold"
ERROR: Final = b"error: "
"""Followed by what the user's function did."""
