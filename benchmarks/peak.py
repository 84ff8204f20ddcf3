"""Extra peak memory of one call on a CPU: the growth of the peak resident set of a fresh process.

Linux with glibc only: it reads /proc and makes the allocator return freed memory.
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
from expo.runtime.host import peak_resident_bytes


def extra_peak_mib(name: str, case: Case) -> float | None:
    """MiB that forward and backward of a contender need, gradients included but not inputs; None without /proc."""
    return in_fresh_process(_loss_peak, name, case) if sys.platform == "linux" else None


def _loss_peak(name: str, case: Case) -> float:
    device = torch.device("cpu")
    is_compiled = "compile" in name
    if not is_compiled:  # the first call loads code that every call uses
        contender(name).prepare(make_inputs(replace(case, shape=TINY), device))().backward()
    inputs = make_inputs(case, device)
    run = contender(name).prepare(inputs)
    if is_compiled:  # compilation takes memory once per shape
        run().backward()
        inputs.clear()
    return growth_mib(lambda: run().backward())


def growth_mib(run: Callable[[], object]) -> float:
    """Growth in MiB of the peak resident set of this process during `run`."""
    # freed memory that the allocator keeps would be reused without being counted
    trim_memory()
    Path("/proc/self/clear_refs").write_text("5")
    before = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 2**20
    run()
    return peak_resident_bytes() / 2**20 - before
