"""Where metrics go besides metrics.jsonl: TensorBoard, Weights & Biases, trackio.

Each library is imported when a run asks for it and not before. One that fails is reported once on stderr and left
alone from then on: metrics.jsonl has every number, and no run ends for a picture of it. Only rank 0 opens any.
"""

import importlib
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
ID_FILE = "tracker-id.txt"  # in the run's folder: the name under which a resumed run is found again


class Tracker(Protocol):
    """Takes the numbers of a run, step by step."""

    def log(self, step: int, row: Mapping[str, Any]) -> None:
        """Notes the numbers of one step; what is no number, or not named in STEP_METRICS, is left out."""

    def close(self) -> None:
        """Writes out what is not yet written; the last call."""


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
    """Raises: ConfigError if a tracker's package is not installed; it says which extra to install."""
    for name in names:
        try:
            importlib.import_module(TRACKERS[name].module)
        except ImportError as error:
            raise ConfigError(
                f'run.trackers names {name}, which cannot be imported ({error}); pip install "expo-rl[{name}]", or '
                f"leave it out"
            ) from error


def open_trackers(names: Sequence[str], folder: Path, config: RunConfig, resume: bool) -> list[Tracker]:
    """The trackers of the run in `folder`; a resumed run goes on in the tracker's own run.

    Args:
        names: of `run.trackers`.
        folder: the run's, which exists.
        config: written to those trackers that show configurations.
        resume: whether the run goes on after a checkpoint. Steps that are taken again replace the old ones in
            TensorBoard; Weights & Biases keeps the old ones, which are equal but for times.

    Raises: ConfigError if a tracker's package is not installed.
    """
    check_trackers(names)
    run = TrackedRun(folder, _run_id(folder, resume) if names else "", config, resume)
    opened = [_Unfailing(name, partial(TRACKERS[name].open, run)) for name in names]
    return [tracker for tracker in opened if not tracker.has_failed]


def _run_id(folder: Path, resume: bool) -> str:
    path = folder / ID_FILE
    if resume and path.exists():
        return path.read_text(encoding="utf-8").strip()
    run_id = secrets.token_hex(4)
    write_bytes_whole(path, f"{run_id}\n".encode())
    return run_id


def _numbers(row: Mapping[str, Any]) -> dict[str, float]:
    """What STEP_METRICS names, `seconds/<phase>` under `seconds`; the step itself is the trackers' axis."""
    return {
        name: float(value)
        for name, value in row.items()
        if name != "step"
        and name.split("/")[0] in STEP_METRICS
        and isinstance(value, int | float)
        and not isinstance(value, bool)
    }


class _Unfailing:
    """A tracker whose first error is reported, and is its last."""

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

    def _attempt(self, act: Callable[[], None]) -> None:
        try:
            act()
        except Exception as error:  # whatever the library raises: its network and files are not the run's
            self.has_failed, self._tracker = True, None
            reason = (str(error) or type(error).__name__).splitlines()[0]
            sys.stderr.write(f"tracker {self._name} failed ({reason}); the run goes on without it\n")


class TensorBoardTracker:
    """Scalars in TensorBoard's files; the writer opens at the first step, which it needs to know on resuming.

    Args:
        folder: where the files go.
        resume: hide what an earlier process wrote at or after the first step.
    """

    def __init__(self, folder: Path, resume: bool) -> None:
        self._folder, self._resume = folder, resume
        self._writer: Any = None

    def log(self, step: int, row: Mapping[str, Any]) -> None:
        """Adds one scalar a number, and flushes: a killed run has lost nothing."""
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
    """A run of Weights & Biases, or of trackio, which has the same calls."""

    def __init__(self, run: Any) -> None:
        self._run = run

    def log(self, step: int, row: Mapping[str, Any]) -> None:
        """Logs all numbers of the step at once."""
        self._run.log(_numbers(row), step=step)

    def close(self) -> None:
        """Waits until the library has written or sent everything."""
        self._run.finish()


def _open_wandb(tracked: TrackedRun) -> Tracker:
    wandb = importlib.import_module("wandb")
    run = wandb.init(
        project=PROJECT,
        dir=str(tracked.folder),
        id=tracked.id,
        name=tracked.folder.name,
        config=tracked.config.model_dump(mode="json"),
        allow_val_change=True,  # what may change on resuming
        resume="allow",
        reinit="create_new",
    )
    return RunTracker(run)


def _open_trackio(tracked: TrackedRun) -> Tracker:
    trackio = importlib.import_module("trackio")
    # it finds a run again by its name, so the name has to be unique
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
