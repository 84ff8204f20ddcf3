"""Checkpoints: everything a run is, written whole or not at all, and found again.

A checkpoint is a folder `step-000050`. It is written under a temporary name, flushed to disk, and renamed: a folder
that bears its final name is whole.
"""

import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

STATE_FILE = "state.pt"


def write_whole(path: Path, write: Callable[[Path], None]) -> None:
    """Calls `write` with a temporary path beside `path`, flushes what it made, and renames it to `path`.

    `path` may be a file or a folder; an older one of that name is replaced.
    """
    temporary = path.with_name(f".{path.name}.part")
    _remove(temporary)
    write(temporary)
    for made in [temporary, *temporary.rglob("*")] if temporary.is_dir() else [temporary]:
        _flush(made)
    if path.is_dir():
        # a folder cannot be renamed over one that has contents
        retired = path.with_name(f".{path.name}.old")
        _remove(retired)
        path.rename(retired)
        temporary.rename(path)
        _remove(retired)
    else:
        temporary.replace(path)
    _flush(path.parent)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


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
