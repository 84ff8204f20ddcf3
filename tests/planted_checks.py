"""A worker of gpu_check whose checks pass, miss a bound, raise, end their process, hang, or need what is not here."""

import os
import sys
import time
from pathlib import Path

from benchmarks.gpu import worker
from benchmarks.gpu.check import Check, Measure, NotHereError


def passes(place):
    yield Measure("error", 1.0, 2.0)
    place.require_gpu("a clock")


def misses(_):
    yield Measure("share", 0.5, 0.8, is_minimum=True)
    yield Measure("NaN", float("nan"), 1.0)
    yield Measure("only reported", 1e9)


def raises(_):
    yield Measure("before", 0.0, 1.0)
    raise RuntimeError("planted")


def dies(_):
    yield Measure("before", 0.0, 1.0)
    os._exit(7)


def hangs(_):
    yield Measure("before", 0.0, 1.0)
    time.sleep(600)


def is_not_here(_):
    yield Measure("before", 0.0, 1.0)
    raise NotHereError("one device")


PLANTED = {
    "raises": Check("", raises),
    "dies": Check("", dies),
    "hangs": Check("", hangs, seconds=1.0),
    "misses": Check("", misses),
    "is not here": Check("", is_not_here),
    "passes": Check("", passes),
}

if __name__ == "__main__":
    worker.CHECKS = PLANTED
    worker.use_interpreter = lambda: None
    sys.exit(worker.main(sys.argv[3:], Path(sys.argv[2]), is_rehearsal=True))
