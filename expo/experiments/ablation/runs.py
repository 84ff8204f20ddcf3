"""Executes the runs as concurrent `python -m expo.train` processes; unfinished runs are resumed."""

import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from expo.errors import AblationError
from expo.experiments.ablation.plan import PlannedRun
from expo.runtime.atomic_io import write_bytes_whole
from expo.runtime.console import Display, Note

POLL_SECONDS = 0.2
LOG = "log.txt"  # in the folder of a run: its output


def run_all(runs: Sequence[PlannedRun], num_jobs: int, display: Display) -> None:
    """Executes all unfinished runs, `num_jobs` at a time with one thread each, and shows the progress.

    Raises: AblationError if a run fails, after the other processes have saved a checkpoint and stopped.
    """
    waiting = [run for run in runs if not run.is_finished]
    processes: dict[subprocess.Popen[bytes], PlannedRun] = {}
    with display.bar("runs", len(runs), done=len(runs) - len(waiting)) as bar:
        try:
            while waiting or processes:
                while waiting and len(processes) < num_jobs:
                    run = waiting.pop(0)
                    processes[_start(run)] = run
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


def _start(run: PlannedRun) -> "subprocess.Popen[bytes]":
    run.folder.mkdir(parents=True, exist_ok=True)
    config = run.folder / "config.yaml"
    write_bytes_whole(config, run.config.to_yaml().encode())
    command = [sys.executable, "-m", "expo.train", str(config), "--resume"]
    with (run.folder / LOG).open("ab") as log:
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C reaches this process alone, which then terminates the runs
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )


def _require_finished(run: PlannedRun, exit_code: int) -> None:
    if run.is_finished:
        return
    raise AblationError(
        f"{run.name} failed with exit code {exit_code} ({_last_line(run.folder / LOG)}); see "
        f"{run.folder / LOG}, then run the same command again to continue"
    )


def _last_line(path: Path) -> str:
    lines = path.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return lines[-1] if lines else "it printed nothing"
