"""How a command ends: every error that is not a fault of this code is one line on stderr, with its own exit code."""

import atexit
import errno
import os
import re
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NoReturn

from expo.errors import ConfigError, ExpoError, FolderError, Interrupted, OutputError
from expo.runtime.parser import fail
from expo.runtime.stdout import discard_stdout

STORAGE = (
    errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EFBIG, errno.ENAMETOOLONG, errno.EIO,
    errno.ENOTDIR, errno.EISDIR, errno.EMFILE, errno.ENFILE, errno.ESTALE,
)  # fmt: skip
"""Errors of files and disks that the user can mend."""
# safetensors and tokenizers are written in Rust, and raise types of their own
RUST_ERROR = re.compile(r"\(os error (\d+)\)")


@contextmanager
def errors_on_one_line(prog: str) -> Iterator[None]:
    """Ends the process with one line on stderr if the block raises an ExpoError, an error of files or disks, or is
    interrupted by Ctrl-C; other errors are faults of this code, and keep their traceback.
    """
    try:
        require_stdout()
        yield
        sys.stdout.flush()  # here, where an error is one line
    except ExpoError as error:
        fail(prog, error)
    except KeyboardInterrupt:
        fail(prog, Interrupted("ended by Ctrl-C"))
    except OSError as error:
        if error.errno == errno.EPIPE:
            discard_stdout()
            fail(prog, OutputError(f"stdout cannot be written ({error.strerror})"))
        if error.errno not in STORAGE:
            raise
        fail(prog, FolderError(f"{reason_of(error)}; check the path, its permissions and the free space"))


def run_and_exit(main: Callable[[], int]) -> NoReturn:
    """Runs the main function of a command on a rank, and ends the process with its exit code.

    The interpreter is not finalized: while it is, a Gloo thread that still releases a tensor aborts the process
    (SIGABRT, https://github.com/pytorch/pytorch/issues/190489), and torchrun calls the finished run failed. Threads are
    joined and exit handlers run as always; an unexpected exception ends the process as always, with its traceback.
    """
    try:
        code = main()
    except SystemExit as ending:
        if not isinstance(ending.code, int):
            raise
        code = ending.code
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError, AttributeError):  # closed, or its disk full: main has reported it
            stream.flush()
    os._exit(code)


def require_stdout() -> None:
    """Raises: ConfigError if this process was started with its stdout closed: the next file that it opens would take
    its place, and receive what libraries print.
    """
    if sys.stdout is None:
        raise ConfigError("stdout is closed; redirect it to a file or to /dev/null")


def disk_error(error: Exception) -> OSError | None:
    """The OSError that an exception is, or that a library has wrapped; None if it is another kind of error."""
    if isinstance(error, OSError):
        return error
    found = RUST_ERROR.search(str(error))
    return OSError(int(found[1]), os.strerror(int(found[1]))) if found else None


@contextmanager
def disk_errors(path: Path, advice: str) -> Iterator[None]:
    """Raises an error of the disk in the block, also one that a library has wrapped, as a FolderError about `path`."""
    try:
        yield
    except Exception as error:
        problem = disk_error(error)
        if problem is None:
            raise
        raise FolderError(f"{path} cannot be written ({problem.strerror or problem}); {advice}") from error


def reason_of(error: OSError) -> str:
    """What happened, and to which file where that is known."""
    reason = error.strerror or str(error)
    return f"{error.filename}: {reason}" if error.filename else reason
