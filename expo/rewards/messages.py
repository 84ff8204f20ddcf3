"""The messages between the trainer and the verifier's worker processes."""

from typing import Final

READY: Final = b"ready"
DONE: Final = b"done"
CORRECT: Final = b"correct"
WRONG: Final = b"wrong"
BAD_GOLD: Final = b"bad gold"
