"""Extra peak memory of one call on a CPU, in a fresh process for each: the growth of its peak resident set.

Linux with glibc only: it reads /proc, and has the allocator give back what it holds.
"""

import resource
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks.contenders import contender
from benchmarks.fresh import in_fresh_process
from benchmarks.inputs import make_inputs
from benchmarks.machine import trim_memory
from benchmarks.shapes import TINY, Case


def extra_peak_mib(name: str, case: Case) -> float | None:
    """MiB that forward and backward of a contender take beyond its inputs, gradients included; None without /proc."""
    return in_fresh_process(_loss_peak, name, case) if sys.platform == "linux" else None


def _loss_peak(name: str, case: Case) -> float:
    device = torch.device("cpu")
    is_compiled = "compile" in name
    if not is_compiled:  # the first call loads what every call runs through
        contender(name).prepare(make_inputs(replace(case, shape=TINY), device))().backward()
    inputs = make_inputs(case, device)
    run = contender(name).prepare(inputs)
    if is_compiled:  # which takes memory too, once, and for each shape
        run().backward()
        inputs.clear()
    return growth_mib(lambda: run().backward())


def growth_mib(run: Callable[[], object]) -> float:
    """MiB that the peak resident set of this process grows by during `run`."""
    # what making the inputs freed but the allocator kept would be used first, uncounted; and the peak includes it
    trim_memory()
    Path("/proc/self/clear_refs").write_text("5")
    before = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 2**20
    run()
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 1024 - before
