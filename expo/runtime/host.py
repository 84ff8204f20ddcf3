"""The memory of this machine and of this process."""

import os
import resource
import sys
from contextlib import suppress
from pathlib import Path

MEMORY_LIMIT = Path("/sys/fs/cgroup/memory.max")  # of the container, in bytes or "max"


def total_memory() -> int:
    """Bytes of memory that this machine, or the container, has."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = MEMORY_LIMIT.read_text().strip() if MEMORY_LIMIT.is_file() else ""
    return min(memory, int(limit)) if limit.isdecimal() else memory


def peak_resident_bytes() -> float:
    """The largest resident set of this process so far."""
    # getrusage's maximum includes the process that started this one; VmHWM does not
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return float(line.split()[1]) * 1024  # "VmHWM:   123 kB"
    largest = float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
    return largest if sys.platform == "darwin" else largest * 1024
