"""What tests must not leave behind: files in the repository, and processes of ours."""

import os
import re
import signal
import sys
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests import ROOT

MARK = "EXPO_TEST_ID"  # an environment variable that every process started by a test inherits
OURS = re.compile(r"-m expo[._]|expo_kernels|torchrun|torch\.distributed|deepspeed|vllm")
CACHES = {"__pycache__", ".mypy_cache", ".ruff_cache", ".pytest_cache", ".hypothesis"}
OUTPUTS = ("runs", "evaluations", "site", "docs", "benchmarks/results")
GRACE_S = 10.0  # for processes that are already ending


def repository_files() -> set[str]:
    """Names in the repository's root and in the folders that commands write to by default."""
    names = {path.name for path in ROOT.iterdir()} - CACHES
    return names | {
        f"{folder}/{path.name}"
        for folder in OUTPUTS
        if (ROOT / folder).is_dir()
        for path in (ROOT / folder).iterdir()
        if path.name not in CACHES
    }


def processes(mark: str) -> dict[int, str]:
    """Command lines by process id of our programs that were started under `mark`, orphans included; Linux only."""
    if sys.platform != "linux":
        return {}
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if f"{MARK}={mark}".encode() not in (folder / "environ").read_bytes().split(b"\0"):
                continue
            command = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
        except OSError:  # it has ended, or is another user's
            continue
        if OURS.search(command):
            found[int(folder.name)] = command
    return found


def end_processes(mark: str) -> list[str]:
    """Kills what is still running after a grace period, and returns its command lines."""
    until = time.monotonic() + GRACE_S
    while (left := processes(mark)) and time.monotonic() < until:
        time.sleep(0.1)
    for process in left:
        try:
            os.kill(process, signal.SIGKILL)
        except ProcessLookupError:
            continue
    return list(left.values())


@contextmanager
def no_running_processes() -> Iterator[None]:
    """Marks every process that is started inside, and fails if one is still running at the end."""
    os.environ[MARK] = mark = uuid.uuid4().hex
    yield
    os.environ.pop(MARK, None)
    running = end_processes(mark)
    assert not running, f"these tests left processes running: {running}"
