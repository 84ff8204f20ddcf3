"""Triton's launches, executed as PTX on the memory of CPU tensors.

Triton itself specialises and compiles each launch for a GPU that is absent; only the execution is replaced. The PTX is
the one that `ptxas` would receive. Not implemented: weak memory beyond happens-before order, asynchronous copies,
tensor cores, function calls, clusters, local memory. Such a kernel raises `EmulatorError`.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import triton
from triton.backends.nvidia.compiler import CUDABackend
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from tests.kernels import compiling
from tests.ptx.launch import LOCKSTEP, Launch, Schedule, TranslatedKernel
from tests.ptx.memory import GlobalMemory
from tests.ptx.program import EmulatorError
from tests.ptx.report import ORDER_DEPENDENT, Report


@contextmanager
def emulated_launches(target: str = "sm_90", *, schedules: Sequence[Schedule] = (LOCKSTEP,)) -> Iterator[Report]:
    """Execute every launch inside the block once for each schedule; the results of the last one stay.

    Args:
        target: a key of `compiling.TARGETS`.
        schedules: orders of warps and thread blocks; the results must be equal bit for bit.
    """
    report = Report()
    original = JITFunction.run

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        assert not warmup
        kernel = original(self, *args, grid=grid, warmup=True, **kwargs)
        *_, binder = self.device_caches[driver.active.get_current_device()]
        bound, specialization, _ = binder(*args, debug=False, **kwargs)
        grid = grid(bound) if callable(grid) else grid
        if any(size != 1 for size in grid[1:]):
            raise EmulatorError(f"the grid is {grid}; only grids of one dimension are implemented")
        if grid[0] > 0:
            kinds = [entry[0] for entry in specialization]
            passed = {
                name: value for (name, value), kind in zip(bound.items(), kinds, strict=True) if kind != "constexpr"
            }
            translated = _translated(kernel)
            memory = GlobalMemory((name, value) for name, value in passed.items() if hasattr(value, "data_ptr"))
            arguments = _arguments(translated, list(passed.values()))

            def launch(schedule: Schedule) -> None:
                Launch(translated, arguments, grid[0], memory, schedule, report).run()

            _run_schedules(schedules, launch, memory, report, translated.program.name)
            report.launches[translated.program.name] += 1
        return kernel

    # Triton takes the driver's target as the device's, and caches kernels by the device's name
    device = compiling.AbsentDevice(compiling.TARGETS[target], name="emulated")
    # machine code is not needed, and ptxas takes as long as everything before it
    no_machine_code = mock.patch.object(CUDABackend, "make_cubin", return_value=b"")
    # kernels without machine code are cached apart from complete ones
    cache = mock.patch.dict(os.environ, TRITON_CACHE_DIR=str(Path(triton.knobs.cache.dir) / "without-machine-code"))
    with mock.patch.object(JITFunction, "run", run), compiling.active_device(device), no_machine_code, cache:
        yield report


_translations: dict[str, TranslatedKernel] = {}


def _translated(kernel: Any) -> TranslatedKernel:
    if kernel.hash not in _translations:
        _translations[kernel.hash] = TranslatedKernel.from_triton(kernel)
    return _translations[kernel.hash]


def _arguments(kernel: TranslatedKernel, values: list[Any]) -> list[float]:
    """Numbers and addresses in the order of the kernel's parameters; Triton appends pointers to scratch memory."""
    unused = len(kernel.program.params) - len(values)
    if unused not in (1, 2):
        raise EmulatorError(f"{kernel.program.name} has {unused} parameters beyond its arguments; expected 1 or 2")
    return [value.data_ptr() if hasattr(value, "data_ptr") else value for value in values] + [0] * unused


def _run_schedules(
    schedules: Sequence[Schedule], launch: Callable[[Schedule], None], memory: GlobalMemory, report: Report, name: str
) -> None:
    """Run a launch once for each schedule from the same memory, and compare what it leaves there."""
    before = memory.copy() if len(schedules) > 1 else []
    first: list[np.ndarray] | None = None
    for schedule in schedules:
        if first is not None:
            memory.restore(before)
        launch(schedule)
        if first is None:
            first = memory.copy() if len(schedules) > 1 else []
            continue
        for span, one, other in zip(memory.spans, first, memory.copy(), strict=True):
            if not np.array_equal(one, other):
                count = int((one != other).sum())
                report.add(ORDER_DEPENDENT, name, memory.names_at(span.start), f"{schedule}: {count} bytes differ")
