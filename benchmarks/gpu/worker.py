"""A worker process of `benchmarks.gpu_check`: runs checks in order and writes a journal, one JSON line per event.

A check that raises does not affect the next one. If an error has left the GPU unusable, the worker ends with
BROKEN_DEVICE, and the remaining checks need a new process.
"""

import json
import os
import sys
import traceback
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu import faults, numerics, speed, steps, training_step
from benchmarks.gpu.check import Check, NeedsGPUError, NotHereError, Place

BROKEN_DEVICE = 3  # exit code
# in the order in which they run: first whether results are right, then what steps cost, then models
CHECKS: dict[str, Check] = {
    **{name: numerics.CHECKS[name] for name in ("self-check", "numerics", "tf32")},
    **faults.CHECKS,
    **steps.CHECKS,
    **speed.CHECKS,
    "training-step-0.5B": training_step.CHECKS["training-step-0.5B"],
    "training-step-1.5B": training_step.CHECKS["training-step-1.5B"],
    "compiled": numerics.CHECKS["compiled"],
    "trainer": training_step.CHECKS["trainer"],
    "vllm": training_step.CHECKS["vllm"],
}


class Journal:
    """Events of checks, appended to a file as they happen."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def write(self, check: str, **event: Any) -> None:
        """Appends one line, which is on disk when this returns."""
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"check": check, **event}) + "\n")
            file.flush()
            os.fsync(file.fileno())


def run_check(name: str, check: Check, place: Place, journal: Journal) -> bool:
    """Runs one check; returns whether it raised an unexpected error."""
    journal.write(name, event="start")
    missed, failed, note = 0, False, ""
    try:
        for measure in check.run(place):
            missed += not measure.is_met
            journal.write(name, event="measure", text=str(measure), measure=measure.record())
        verdict = "missed" if missed else "met"
    except NeedsGPUError as need:
        verdict, note = ("missed" if missed else "needs a GPU"), f"stops where it needs {need}"
    except NotHereError as reason:
        verdict, note = ("missed" if missed else "not here"), str(reason)
    except Exception as error:  # a check may raise anything; the others go on
        traceback.print_exc()
        verdict, note, failed = "error", f"{type(error).__name__}: {error}"[:1000], True
    journal.write(name, event="end", verdict=verdict, note=note)
    return failed


def use_interpreter() -> None:
    """Runs the kernels on CPU tensors in Triton's interpreter, which must be selected before Triton is imported."""
    assert os.environ.get("TRITON_INTERPRET") == "1"
    # NumPy warns of infinities and NaNs, which masked positions hold and the kernels leave out
    warnings.filterwarnings("ignore", category=RuntimeWarning, module="triton.runtime.interpreter")
    import tests.kernels.interpreter.kernels_on_cpu  # noqa: F401 - the import selects the kernels


def main(names: Sequence[str], path: Path, *, is_rehearsal: bool) -> int:
    """Runs the named checks; 0, or BROKEN_DEVICE."""
    place = Place(torch.device("cpu" if is_rehearsal else "cuda"), is_rehearsal)
    if is_rehearsal:
        use_interpreter()
    journal = Journal(path)
    for name in names:
        if run_check(name, CHECKS[name], place, journal) and _is_broken(place):
            return BROKEN_DEVICE
        if place.device.type == "cuda":
            torch.cuda.empty_cache()
    return 0


def _is_broken(place: Place) -> bool:
    """Whether the GPU refuses further work in this process, as after an illegal access."""
    if place.device.type != "cuda":
        return False
    try:
        torch.ones(1, device=place.device).add_(1)
        torch.cuda.synchronize(place.device)
    except RuntimeError:
        return True
    return False


if __name__ == "__main__":
    sys.exit(main(sys.argv[3:], Path(sys.argv[2]), is_rehearsal=sys.argv[1] == "rehearse"))
