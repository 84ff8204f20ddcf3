"""Reads what is in the caches of the Hugging Face hub's libraries, without a network."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from huggingface_hub import constants


@contextmanager
def offline_hub() -> Iterator[None]:
    """The libraries read only their caches inside, as with HF_HUB_OFFLINE=1; what is not there is an OSError."""
    # both libraries read the variable when they are imported, and these values at every download
    before = _set_offline(True)
    try:
        yield
    finally:
        _set_offline(before)


def _set_offline(value: bool) -> bool:
    """Sets it for both libraries, and returns what it was."""
    before = bool(constants.HF_HUB_OFFLINE)
    for module in filter(None, (constants, sys.modules.get("datasets.config"))):
        module.HF_HUB_OFFLINE = value  # type: ignore[attr-defined]
    return before


def is_offline() -> bool:
    """Whether the environment forbids downloads (HF_HUB_OFFLINE)."""
    return bool(constants.HF_HUB_OFFLINE)
