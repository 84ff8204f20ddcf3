"""The words that the verifier's worker processes and the trainer exchange."""

from typing import Final

READY: Final = b"ready"
DONE: Final = b"done"
CORRECT: Final = b"correct"
WRONG: Final = b"wrong"
BAD_GOLD: Final = b"bad gold"
