"""The runs: ordinary `python -m expo.train` processes, a few side by side, taken up again where they stand."""

import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from expo.errors import AblationError
from expo.experiments.ablation.plan import Run
from expo.runtime.atomic_io import write_bytes_whole
from expo.runtime.console import Display

POLL_SECONDS = 0.2
LOG = "log.txt"  # what a run prints, in its folder


def run_all(runs: Sequence[Run], num_jobs: int, display: Display) -> None:
    """Runs what is not finished, `num_jobs` side by side on one core each, and shows what is done.

    Raises: AblationError if one of them ends before its end, once those beside it have been asked to save and end.
    """
    waiting = [run for run in runs if not run.is_finished]
    under_way: dict[subprocess.Popen[bytes], Run] = {}
    with display.bar("runs", len(runs), done=len(runs) - len(waiting)) as bar:
        try:
            while waiting or under_way:
                while waiting and len(under_way) < num_jobs:
                    run = waiting.pop(0)
                    under_way[_start(run)] = run
                time.sleep(POLL_SECONDS)
                for process in [process for process in under_way if process.poll() is not None]:
                    run = under_way.pop(process)
                    _require_finished(run, process.returncode)
                    bar.advance(note=run.name)
        finally:
            for process in under_way:
                process.terminate()  # they write a checkpoint
            for process in under_way:
                process.wait()


def _start(run: Run) -> "subprocess.Popen[bytes]":
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
            start_new_session=True,  # Ctrl-C reaches it through us, as a request to save and end
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )


def _require_finished(run: Run, exit_code: int) -> None:
    if run.is_finished:
        return
    raise AblationError(
        f"{run.name} ended with exit code {exit_code} before its end ({_last_line(run.folder / LOG)}); see "
        f"{run.folder / LOG}, then give the same command to go on"
    )


def _last_line(path: Path) -> str:
    lines = path.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return lines[-1] if lines else "it printed nothing"
