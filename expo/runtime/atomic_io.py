"""Files and folders written whole or not at all."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

LEFTOVERS = (".part", ".old", ".universal")  # half written, half deleted, converted for another number of ranks


def write_whole(path: Path, write: Callable[[Path], None]) -> None:
    """Calls `write` with a temporary path beside `path`, flushes what it made, and renames it to `path`.

    `path` may be a file or a folder; an older one of that name is replaced.
    """
    temporary = path.with_name(f".{path.name}.part")
    _remove(temporary)
    try:
        write(temporary)
        for made in [temporary, *temporary.rglob("*")] if temporary.is_dir() else [temporary]:
            flush(made)
        _put_in_place(temporary, path)
    finally:
        _remove(temporary)
    flush(path.parent)


def write_bytes_whole(path: Path, content: bytes) -> None:
    """Writes one file whole."""

    def write(temporary: Path) -> None:
        temporary.write_bytes(content)

    write_whole(path, write)


def _put_in_place(temporary: Path, path: Path) -> None:
    if path.is_dir():
        # a folder cannot be renamed over one that has contents
        retired = path.with_name(f".{path.name}.old")
        _remove(retired)
        path.rename(retired)
        temporary.rename(path)
        _remove(retired)
    else:
        temporary.replace(path)


def remove_leftovers(folder: Path) -> None:
    """Removes what processes that died have left in a folder: names such as `.name.part` that this project gives."""
    for suffix in LEFTOVERS:
        for path in folder.glob(f".*{suffix}"):
            _remove(path)


def flush(path: Path) -> None:
    """Returns when the file or folder is on the disk."""
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
