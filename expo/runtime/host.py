"""The memory of this machine."""

import os
from pathlib import Path

MEMORY_LIMIT = Path("/sys/fs/cgroup/memory.max")  # of the container, in bytes or "max"


def total_memory() -> int:
    """Bytes of memory that this machine, or the container, has."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = MEMORY_LIMIT.read_text().strip() if MEMORY_LIMIT.is_file() else ""
    return min(memory, int(limit)) if limit.isdecimal() else memory
