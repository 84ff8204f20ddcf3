"""The errors that end a command, each with the exit code of the command.

A command prints the error as one line on stderr and exits with its `exit_code`. Exit code 0 means success; 75 means
that a phase exceeded its deadline (`expo/runtime/watchdog.py`), 130 that Ctrl-C ended the command.
"""

from typing import ClassVar

DEADLINE_EXIT_CODE = 75  # EX_TEMPFAIL of sysexits.h: trying again may help
INTERRUPT_EXIT_CODE = 130  # 128 + SIGINT, as a shell reports it


class ExpoError(Exception):
    """Base of all errors of this package.

    exit_code: 2 if the command cannot start as it was given, 1 if it started and cannot continue.
    """

    exit_code: ClassVar[int] = 1


class ConfigError(ExpoError):
    """A configuration, a file or a combination of both is invalid; the message says what to change."""

    exit_code = 2


class HubError(ConfigError):
    """Something on the Hugging Face hub cannot be read from here."""


class RankError(ExpoError):
    """An error that only this rank knows of; every rank prints its own."""


class NotARunError(ExpoError, ValueError):
    """The folder is not the folder of a run."""

    exit_code = 2


class GoldError(ExpoError, ValueError):
    """No reply can be graded against a gold answer."""


class GraderError(ExpoError, RuntimeError):
    """The processes that grade replies cannot start, or were ended from outside."""


class RewardError(ExpoError):
    """A reward function raised, or returned something other than one finite number for each reply."""


class EngineError(ExpoError):
    """A rollout engine cannot continue, and neither can the run; the run can be resumed."""


class SyncError(ExpoError):
    """The rollout engine does not hold the policy's weights after a weight sync."""


class CheckpointError(ExpoError):
    """A checkpoint cannot be written, found or read."""


class FolderError(ExpoError):
    """A file in the folder of a run cannot be written; the run can be resumed."""


class Diverged(ExpoError):  # noqa: N818  # the state of a run, as its message says
    """Too many updates in a row had a non-finite loss or gradient, or the policy gives non-finite log-probs."""


class Collapsed(Diverged):
    """The policy no longer learns, though its numbers are finite, and run.end_on_collapse is set."""

    exit_code = 3


class AblationError(ExpoError):
    """A run of an ablation failed."""


class StopRequested(ExpoError):  # noqa: N818  # not a failure: training saves a checkpoint and ends
    """A signal, run.save_by_minutes or a closed stdout asks the run to save a checkpoint and end."""


class Interrupted(ExpoError):  # noqa: N818  # not a failure: the user ended the command
    """Ctrl-C ended the command, after it had saved."""

    exit_code = INTERRUPT_EXIT_CODE


class OutputError(ExpoError):
    """Stdout cannot be written: it is closed, or its disk is full."""


def first_line(error: BaseException) -> str:
    """The first line of an error's message that is not empty, at most 300 characters; its type if it has no message."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines or [repr(error)])[0][:300]
