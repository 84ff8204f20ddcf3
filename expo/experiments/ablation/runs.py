"""Executes jobs, such as training runs, as concurrent processes; unfinished runs are resumed."""

import os
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from expo.errors import AblationError
from expo.runtime.console import Display, Note

POLL_SECONDS = 0.2
LOG = "log.txt"  # in the folder of a run: its output
VARIABLES = {
    "OMP_NUM_THREADS": "1",
    # glibc maps and unmaps every large block anew, and a small model's step spends a sixth of its CPU time on the page
    # faults; with these it keeps the memory
    "MALLOC_MMAP_THRESHOLD_": str(2**32),
    "MALLOC_TRIM_THRESHOLD_": str(2**33),
    "MALLOC_TOP_PAD_": str(2**26),
}
"""Environment variables of the processes."""


class Job(Protocol):
    """What one process does."""

    @property
    def name(self) -> str:
        """As text, for messages."""

    @property
    def folder(self) -> Path:
        """The folder of its log."""

    @property
    def is_ready(self) -> bool:
        """Whether the jobs that it depends on have finished."""

    @property
    def is_finished(self) -> bool:
        """Whether its results are there."""

    def command(self) -> list[str]:
        """The command of its process; may write files that the process reads."""


def run_all(runs: Sequence[Job], num_jobs: int, display: Display) -> None:
    """Executes all unfinished runs, `num_jobs` at a time with one thread each, and shows the progress. They start in
    order, those that are ready first.

    Raises: AblationError if a run fails, after the other processes have saved a checkpoint and stopped.
    """
    waiting = [run for run in runs if not run.is_finished]
    processes: dict[subprocess.Popen[bytes], Job] = {}
    with display.bar("runs", len(runs), done=len(runs) - len(waiting)) as bar:
        try:
            while waiting or processes:
                while len(processes) < num_jobs and (run := next((run for run in waiting if run.is_ready), None)):
                    waiting.remove(run)
                    processes[_start(run)] = run
                assert processes, f"{waiting[0].name} waits for a run that is not planned"
                time.sleep(POLL_SECONDS)
                for process in [process for process in processes if process.poll() is not None]:
                    run = processes.pop(process)
                    _require_finished(run, process.returncode)
                    bar.advance(note=Note((run.name,)))
        finally:
            for process in processes:
                process.terminate()  # on SIGTERM a run saves a checkpoint and stops
            for process in processes:
                process.wait()


def _start(run: Job) -> "subprocess.Popen[bytes]":
    run.folder.mkdir(parents=True, exist_ok=True)
    command = run.command()
    with (run.folder / LOG).open("ab") as log:
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C reaches this process alone, which then terminates the runs
            env={**os.environ, **VARIABLES},
        )


def _require_finished(run: Job, exit_code: int) -> None:
    if run.is_finished:
        return
    raise AblationError(
        f"{run.name} failed with exit code {exit_code} ({_last_line(run.folder / LOG)}); see "
        f"{run.folder / LOG}, then run the same command again to continue"
    )


def _last_line(path: Path) -> str:
    lines = path.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return lines[-1] if lines else "it printed nothing"
