"""Experiment trackers: TensorBoard, Weights & Biases and trackio receive the metrics besides metrics.jsonl.

Each library is imported only if run.trackers names it. A tracker that fails is reported once on stderr and not used
again: metrics.jsonl has every number, and a tracker must not end a run. Only rank 0 opens trackers.
"""

import importlib
import re
import secrets
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from expo.config import RunConfig
from expo.errors import ConfigError
from expo.run.metrics import STEP_METRICS
from expo.runtime.atomic_io import write_bytes_whole

PROJECT = "expo"
ID_FILE = "tracker-id.txt"  # in the run's folder: the id under which a resumed run continues in its trackers


class Tracker(Protocol):
    """Receives the metrics of a run, step by step."""

    def log(self, step: int, row: Mapping[str, Any]) -> None:
        """Logs the metrics of one step; entries that are not numbers or not in STEP_METRICS are left out."""

    def close(self) -> None:
        """Writes what is still buffered; no call may follow."""


@dataclass(frozen=True)
class TrackedRun:
    """The run that a tracker is opened for.

    folder: the run's, which exists; id: unique, and the same after a resume; config: the whole run; resume: whether the
    run continues from a checkpoint.
    """

    folder: Path
    id: str
    config: RunConfig
    resume: bool


@dataclass(frozen=True)
class TrackerKind:
    """A tracker that `run.trackers` can name: the module that it imports, and the function that opens it for a run."""

    module: str
    open: Callable[[TrackedRun], Tracker]


def check_trackers(names: Sequence[str]) -> None:
    """Checks that the package of each tracker can be imported.

    Raises: ConfigError if one cannot; it names the extra to install.
    """
    for name in names:
        try:
            importlib.import_module(TRACKERS[name].module)
        except ImportError as error:
            raise ConfigError(
                f'run.trackers names {name}, which cannot be imported ({error}); pip install "expo-rl[{name}]", or '
                f"leave it out"
            ) from error


def open_trackers(names: Sequence[str], folder: Path, config: RunConfig, resume: bool) -> list[Tracker]:
    """Opens the trackers of the run in `folder`; a resumed run continues in the same run of each tracker.

    Args:
        names: from `run.trackers`.
        folder: of the run; it exists.
        config: sent to the trackers that show configurations.
        resume: whether the run is resumed. Repeated steps replace the old ones in TensorBoard; Weights & Biases keeps
            the old ones, which differ in times only.

    Raises: ConfigError if a tracker's package is not installed.
    """
    check_trackers(names)
    run = TrackedRun(folder, _run_id(folder, resume) if names else "", config, resume)
    opened = [_SafeTracker(name, partial(TRACKERS[name].open, run)) for name in names]
    return [tracker for tracker in opened if not tracker.has_failed]


def _run_id(folder: Path, resume: bool) -> str:
    path = folder / ID_FILE
    if resume and path.is_file():
        saved = path.read_text(encoding="utf-8", errors="replace").strip()
        if re.fullmatch(r"[0-9a-f]{8}", saved):
            return saved
        sys.stderr.write(f"{path} holds no id of a run; the trackers begin a new run\n")
    run_id = secrets.token_hex(4)
    write_bytes_whole(path, f"{run_id}\n".encode())
    return run_id


def _numbers(row: Mapping[str, Any]) -> dict[str, float]:
    """The numbers that STEP_METRICS names, `seconds/<phase>` by `seconds`; the step is the x-axis and left out."""
    return {
        name: float(value)
        for name, value in row.items()
        if name != "step"
        and name.split("/")[0] in STEP_METRICS
        and isinstance(value, int | float)
        and not isinstance(value, bool)
    }


class _SafeTracker:
    """A tracker that is reported at its first error, and not used again."""

    def __init__(self, name: str, open_tracker: Callable[[], Tracker]) -> None:
        self._name = name
        self._tracker: Tracker | None = None
        self.has_failed = False

        def start() -> None:
            self._tracker = open_tracker()

        self._attempt(start)

    def log(self, step: int, row: Mapping[str, Any]) -> None:
        tracker = self._tracker
        if tracker is not None:
            self._attempt(lambda: tracker.log(step, row))

    def close(self) -> None:
        tracker = self._tracker
        if tracker is not None:
            self._attempt(tracker.close)

    def _attempt(self, call: Callable[[], None]) -> None:
        try:
            call()
        except Exception as error:  # whatever the library raises must not end the run
            self.has_failed, self._tracker = True, None
            reason = (str(error) or type(error).__name__).splitlines()[0]
            sys.stderr.write(f"tracker {self._name} failed ({reason}); the run continues without it\n")


class TensorBoardTracker:
    """Writes scalars to TensorBoard's files; the writer opens at the first logged step, which it needs on resume.

    Args:
        folder: of the files.
        resume: hide what an earlier process wrote at or after the first logged step.
    """

    def __init__(self, folder: Path, resume: bool) -> None:
        self._folder, self._resume = folder, resume
        self._writer: Any = None

    def log(self, step: int, row: Mapping[str, Any]) -> None:
        """Adds a scalar for each number, and flushes, so that a killed run loses nothing."""
        if self._writer is None:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(self._folder), purge_step=step if self._resume else None)
        for name, value in _numbers(row).items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self) -> None:
        """Closes the file."""
        if self._writer is not None:
            self._writer.close()


class RunTracker:
    """A run of Weights & Biases, or of trackio, which has the same interface."""

    def __init__(self, run: Any) -> None:
        self._run = run

    def log(self, step: int, row: Mapping[str, Any]) -> None:
        """Logs all numbers of the step at once."""
        self._run.log(_numbers(row), step=step)

    def close(self) -> None:
        """Waits until the library has written or sent all data."""
        self._run.finish()


def _open_wandb(tracked: TrackedRun) -> Tracker:
    wandb = importlib.import_module("wandb")
    run = wandb.init(
        project=PROJECT,
        dir=str(tracked.folder),
        id=tracked.id,
        name=tracked.folder.name,
        config=tracked.config.model_dump(mode="json"),
        allow_val_change=True,  # some settings may change on resume
        resume="allow",
        reinit="create_new",
    )
    return RunTracker(run)


def _open_trackio(tracked: TrackedRun) -> Tracker:
    trackio = importlib.import_module("trackio")
    # it identifies a run by its name, so the name must be unique
    run = trackio.init(
        project=PROJECT,
        name=f"{tracked.folder.name}-{tracked.id}",
        config=tracked.config.model_dump(mode="json"),
        resume="allow",
    )
    return RunTracker(run)


TRACKERS = {
    "tensorboard": TrackerKind(
        "torch.utils.tensorboard", lambda tracked: TensorBoardTracker(tracked.folder / "tensorboard", tracked.resume)
    ),
    "wandb": TrackerKind("wandb", _open_wandb),
    "trackio": TrackerKind("trackio", _open_trackio),
}
"""Every tracker by its name in `run.trackers`."""
