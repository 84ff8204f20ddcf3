"""Atomic writes of files and folders: a reader sees the old content or the new, never a part."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

LEFTOVERS = (".part", ".old", ".universal")  # being written, being deleted, converted for another number of ranks


def write_whole(path: Path, write: Callable[[Path], None]) -> None:
    """Calls `write` with a temporary path beside `path`, flushes the result to disk, and renames it to `path`.

    `path` may be a file or a folder; an existing one is replaced.
    """
    temporary = path.with_name(f".{path.name}.part")
    _remove(temporary)
    try:
        write(temporary)
        for written in [temporary, *temporary.rglob("*")] if temporary.is_dir() else [temporary]:
            flush(written)
        _replace(temporary, path)
    finally:
        _remove(temporary)
    flush(path.parent)


def write_bytes_whole(path: Path, content: bytes) -> None:
    """Writes one file atomically."""

    def write(temporary: Path) -> None:
        temporary.write_bytes(content)

    write_whole(path, write)


def _replace(temporary: Path, path: Path) -> None:
    if path.is_dir():
        # a folder cannot be renamed over one that is not empty
        retired = path.with_name(f".{path.name}.old")
        _remove(retired)
        path.rename(retired)
        temporary.rename(path)
        _remove(retired)
    else:
        temporary.replace(path)


def remove_leftovers(folder: Path) -> None:
    """Removes the temporary files that interrupted processes left in a folder, such as `.name.part`."""
    for suffix in LEFTOVERS:
        for path in folder.glob(f".*{suffix}"):
            _remove(path)


def flush(path: Path) -> None:
    """Flushes a file or folder to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():  # of a link, only the link
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
