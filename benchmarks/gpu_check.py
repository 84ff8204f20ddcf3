"""All checks that need a GPU, in one command: `python -m benchmarks.gpu_check --out FOLDER`.

It runs from a checkout with the installed PyTorch (2.9 or newer) and Triton (3.4 or newer), without a network; packages
that are missing are named and their checks left out. Checks run in a process of their own, which is replaced if one
breaks it or exceeds its time. `FOLDER/gpu_check.json` is rewritten after every check, with a verdict for each: met,
missed, error, not here, or not run. `--rehearse` runs the same code with tiny sizes on a CPU, in Triton's interpreter,
up to where a GPU is needed. Exit code: 0 if no check is missed or fails, 1 otherwise, 2 without a GPU.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.check import Check
from benchmarks.gpu.worker import BROKEN_DEVICE, CHECKS
from benchmarks.stamp import RESULTS, ROOT, installed_version, stamp, write_results

SECONDS = 570.0  # for all checks on a GPU
REHEARSAL_FACTOR = 4.0  # of every time limit in a rehearsal: interpreted kernels on a CPU that may be busy
START_SECONDS = 120.0  # of a process, before its first check
POLL_SECONDS = 0.2
PEERS = ("transformers", "trl", "liger-kernel", "cut-cross-entropy", "quack-kernels", "vllm", "deepspeed", "pydantic")
FAILURES = ("missed", "error", "not run")


@dataclass
class Result:
    """A check's measures and verdict so far."""

    target: str
    verdict: str = "not run"
    note: str = ""
    seconds: float = 0.0
    measures: list[dict[str, Any]] = field(default_factory=list)


class Session:
    """The results of all checks, kept on disk."""

    def __init__(self, names: Sequence[str], checks: dict[str, Check], folder: Path, *, is_rehearsal: bool) -> None:
        self._path, self._is_rehearsal = folder / "gpu_check.json", is_rehearsal
        self.time_factor = REHEARSAL_FACTOR if is_rehearsal else 1.0
        self._started = time.monotonic()
        self._stamp = stamp(torch.device("cpu" if is_rehearsal else "cuda"))
        self.results = {name: Result(checks[name].target) for name in names}
        self.missing = [name for name in PEERS if installed_version(name) is None]
        self.write()

    def write(self) -> None:
        """Rewrites the JSON file atomically."""
        described = {"stamp": self._stamp, "rehearsal": self._is_rehearsal, "missing": self.missing}
        checks = [{"name": name, **vars(result)} for name, result in self.results.items()]
        write_results(self._path, {**described, "seconds": round(self.seconds, 1), "checks": checks})

    @property
    def seconds(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self._started

    def end(self, name: str, verdict: str, note: str, seconds: float) -> None:
        """Records a verdict."""
        result = self.results[name]
        result.verdict, result.note, result.seconds = verdict, note, round(seconds, 1)
        because = f" ({note})" if note else ""
        print(f"{verdict.upper() if verdict in FAILURES else verdict}: {name}, {seconds:.0f} s{because}", flush=True)
        self.write()

    @property
    def failed(self) -> list[str]:
        """Checks that are missed, failed or did not run."""
        return [name for name, result in self.results.items() if result.verdict in FAILURES]


class Worker:
    """A process that runs checks, and the journal that it writes."""

    def __init__(self, module: str, names: Sequence[str], journal: Path, *, is_rehearsal: bool) -> None:
        journal.write_text("")
        self._journal, self._offset = journal, 0
        self.running: str | None = None
        self.running_since = time.monotonic()
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
        if is_rehearsal:
            environment["TRITON_INTERPRET"] = "1"
        mode = "rehearse" if is_rehearsal else "run"
        command = [sys.executable, "-m", module, mode, str(journal), *names]
        self._process = subprocess.Popen(command, cwd=ROOT, env=environment, process_group=0)

    def follow(self, session: Session) -> int | None:
        """Records what the journal has gained; the exit code, or None while the process runs."""
        code = self._process.poll()  # before reading, so that nothing is missed
        with self._journal.open(encoding="utf-8") as file:
            file.seek(self._offset)
            while (line := file.readline()).endswith("\n"):
                self._offset = file.tell()
                self._record(json.loads(line), session)
        return code

    def _record(self, event: dict[str, Any], session: Session) -> None:
        name, now = event["check"], time.monotonic()
        if event["event"] == "start":
            self.running, self.running_since = name, now
            print(f"{name}: {session.results[name].target}", flush=True)
        elif event["event"] == "measure":
            session.results[name].measures.append(event["measure"])
            print(f"  {'ok    ' if event['measure']['is_met'] else 'MISSED'}  {event['text']}", flush=True)
        else:
            self.running, started, self.running_since = None, self.running_since, now
            session.end(name, event["verdict"], event["note"], now - started)

    def stop(self) -> None:
        """Ends the process and those that it started."""
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()


def run_checks(
    session: Session,
    checks: dict[str, Check],
    journal: Path,
    seconds: float,
    *,
    is_rehearsal: bool,
    module: str = "benchmarks.gpu.worker",
) -> None:
    """Runs every check of the session once, in as many processes of `module` as it takes."""
    remaining = list(session.results)
    while remaining and session.seconds < seconds:
        worker = Worker(module, remaining, journal, is_rehearsal=is_rehearsal)
        try:
            note = _follow(worker, session, seconds, checks)
        finally:
            worker.stop()
        remaining = [name for name in remaining if session.results[name].verdict == "not run"]
        if note and remaining:
            # a process may end before it starts a check: it counts as an error of the first one, so that the loop ends
            session.end(remaining.pop(0), "error", note, time.monotonic() - worker.running_since)
    for name in remaining:
        session.results[name].note = f"the time limit of {seconds:.0f} s for all checks had passed"
    session.write()
    journal.unlink(missing_ok=True)


def _follow(worker: Worker, session: Session, seconds: float, checks: dict[str, Check]) -> str:
    """Waits for the end of a worker; returns why it ended before its last check, or an empty text."""
    while True:
        code = worker.follow(session)
        if code is not None:
            is_orderly = worker.running is None and code in (0, BROKEN_DEVICE)
            return "" if is_orderly else f"its process ended with exit code {code}"
        allowed = (checks[worker.running].seconds if worker.running else START_SECONDS) * session.time_factor
        if time.monotonic() - worker.running_since > allowed:
            return f"it took longer than {allowed:.0f} s"
        if session.seconds > seconds:
            return f"the time limit of {seconds:.0f} s for all checks was reached"
        time.sleep(POLL_SECONDS)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of gpu_check.json")
    parser.add_argument("--checks", nargs="+", choices=tuple(CHECKS), default=tuple(CHECKS), help="only these")
    parser.add_argument("--seconds", type=float, help=f"time limit of all checks (default: {SECONDS:.0f} on a GPU)")
    parser.add_argument("--rehearse", action="store_true", help="tiny sizes on a CPU, up to where a GPU is needed")
    options = parser.parse_args(arguments)
    if not options.rehearse and not torch.cuda.is_available():
        print("no GPU found: gpu_check needs a CUDA or HIP device for which torch.cuda.is_available() is true")
        return 2
    options.out.mkdir(parents=True, exist_ok=True)
    session = Session(options.checks, CHECKS, options.out, is_rehearsal=options.rehearse)
    print(f"not installed: {', '.join(session.missing) or 'nothing'}")
    journal = options.out / "gpu_check.jsonl"
    seconds = SECONDS * session.time_factor if options.seconds is None else options.seconds
    run_checks(session, CHECKS, journal, seconds, is_rehearsal=options.rehearse)
    counts = {}
    for result in session.results.values():
        counts[result.verdict] = counts.get(result.verdict, 0) + 1
    total = ", ".join(f"{count} {verdict}" for verdict, count in sorted(counts.items()))
    print(f"{total}; {session.seconds:.0f} s; written to {options.out / 'gpu_check.json'}")
    return int(bool(session.failed))


if __name__ == "__main__":
    sys.exit(main())
