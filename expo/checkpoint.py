"""Checkpoints: everything a run is, written whole or not at all, and found again.

A checkpoint is a folder `step-000050`. It is written under a temporary name, flushed to disk, and renamed: a folder
that bears its final name is whole.
"""

import shutil
import sys
from pathlib import Path
from typing import Any

import torch

from expo.files import write_whole

STATE_FILE = "state.pt"


def save_checkpoint(folder: Path, step: int, state: dict[str, Any], keep: int) -> Path:
    """Writes `folder/step-NNNNNN` and deletes all but the `keep` newest; returns the new one's path."""
    path = folder / f"step-{step:06d}"

    def write(temporary: Path) -> None:
        temporary.mkdir(parents=True)
        torch.save({**state, "step": step}, temporary / STATE_FILE)

    folder.mkdir(parents=True, exist_ok=True)
    write_whole(path, write)
    for old in list_checkpoints(folder)[:-keep]:
        shutil.rmtree(old)
    return path


def list_checkpoints(folder: Path) -> list[Path]:
    """Whole checkpoints in `folder`, oldest first."""
    return sorted(path for path in folder.glob("step-*") if (path / STATE_FILE).is_file())


def load_newest(folder: Path) -> dict[str, Any] | None:
    """The state of the newest checkpoint that can be read, on the CPU; None if there is none.

    An unreadable one is named on stderr and the one before it is taken.
    """
    for path in reversed(list_checkpoints(folder)):
        try:
            state: dict[str, Any] = torch.load(path / STATE_FILE, map_location="cpu", weights_only=True)
        except (RuntimeError, OSError, EOFError, ValueError) as error:
            sys.stderr.write(
                f"checkpoint {path} cannot be read ({str(error).splitlines()[0]}); trying the one before\n"
            )
        else:
            return state
    return None
