"""Locks that a killed process left in the folder where PyTorch builds C++ extensions.

A process that builds an extension holds a file named `lock` open, and the others wait, without a deadline, until it is
deleted, which a killed process never does (`torch.utils.file_baton`).
"""

import os
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

# file systems of one machine, where every process that may hold a lock can be seen
LOCAL = {"bcachefs", "btrfs", "ext2", "ext3", "ext4", "f2fs", "overlay", "ramfs", "tmpfs", "xfs", "zfs"}
ABANDONED_S = 3600.0  # on any other: without a change in the folder for so long; no build takes an hour


def remove_abandoned_locks(root: Path | None = None) -> list[Path]:
    """Deletes the locks that no process holds, and names them on stderr.

    A lock of this user is abandoned if no process on this machine has it open; on a file system that other machines may
    share, only once its folder has not changed for an hour.

    Args:
        root: folder of the builds; None: PyTorch's.
    """
    removed = []
    for lock in _locks(root or _build_root()):
        if not _is_abandoned(lock):
            continue
        with suppress(OSError):  # another process was faster, or owns it
            lock.unlink()
            removed.append(lock)
            sys.stderr.write(f"removed {lock}, which an interrupted build of an extension had left\n")
    return removed


def _build_root() -> Path:
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(os.environ.get("TORCH_EXTENSIONS_DIR") or cache / "torch_extensions")


def _locks(root: Path) -> Iterator[Path]:
    for pattern in ("*/lock", "*/*/lock"):  # by Python and CUDA version, unless the environment names the folder
        yield from root.glob(pattern)


def _is_abandoned(lock: Path) -> bool:
    try:
        found = lock.stat()
        if found.st_uid != os.getuid() or _is_open(found):
            return False
        changed = max(path.stat().st_mtime for path in (lock, *lock.parent.iterdir()))
    except OSError:  # deleted meanwhile
        return False
    return _file_system(lock) in LOCAL or time.time() - changed > ABANDONED_S


def _is_open(found: os.stat_result) -> bool:
    """Whether a process of this user has the file open; never where the system has no /proc."""
    for entry in Path("/proc").glob("[0-9]*/fd/*"):
        with suppress(OSError):
            opened = entry.stat()
            if (opened.st_dev, opened.st_ino) == (found.st_dev, found.st_ino):
                return True
    return False


def _file_system(path: Path) -> str:
    """The type of the file system that holds `path`, "" if the system does not tell."""
    best, kind = Path(), ""
    with suppress(OSError):
        for line in Path("/proc/self/mounts").read_text().splitlines():
            _, mounted, found, *_ = line.split(" ")
            place = Path(mounted.encode().decode("unicode_escape"))  # spaces are written as \040
            if path.resolve().is_relative_to(place) and len(place.parts) >= len(best.parts):
                best, kind = place, found
    return kind
