"""Run launchers for a GPU that need not be present: every kernel that they launch is compiled for it and recorded.

No kernel is executed, and outputs do not change. `TRITON_INTERPRET` must be unset.
"""

import re
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from expo_kernels import _launch

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
# the driver in use: Triton 3.4 has another name for it
_ACTIVE = "_active" if "_active" in vars(driver) else "active"
BINARIES = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


@dataclass
class Launched:
    """The kernels that launchers launched."""

    compiled: dict[str, Any] = field(default_factory=dict)  # compile key -> kernel
    keys: list[tuple[str, str]] = field(default_factory=list)  # (kernel, compile key) of each launch

    @property
    def kernels(self) -> list[Any]:
        return list(self.compiled.values())


class AbsentDevice:
    """What Triton asks a driver for, so that it compiles for a GPU that is not present."""

    def __init__(self, target: GPUTarget, name: str = "absent") -> None:
        self.target, self.name = target, name

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> str:
        # Triton caches kernels by device, so each target has a device name of its own
        return f"{self.name} {self.target}"

    def get_current_stream(self, _device: str) -> int:
        return 0


def active_device(device: AbsentDevice) -> AbstractContextManager[Any]:
    """A context in which Triton compiles for this device."""
    return mock.patch.object(driver, _ACTIVE, device)


@contextmanager
def launches(target: GPUTarget, *, compiles: bool = True) -> Iterator[Launched]:
    """Compile the kernels launched inside the block, or only record their keys with `compiles=False`."""
    launched = Launched()
    original = JITFunction.run

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        *_, binder = self.device_caches[driver.active.get_current_device()]
        _, specialization, options = binder(*args, debug=False, **kwargs)
        key = str((self.__name__, specialization, sorted(options.items())))
        launched.keys.append((self.__name__, key))
        if compiles and key not in launched.compiled:
            launched.compiled[key] = original(self, *args, grid=grid, warmup=True, **kwargs)
        return launched.compiled.get(key)

    with (
        mock.patch.object(JITFunction, "run", run),
        active_device(AbsentDevice(target)),
        mock.patch.object(_launch, "is_amd", return_value=target.backend == "hip"),
    ):
        yield launched


@dataclass(frozen=True)
class Usage:
    """The resources of a compiled kernel."""

    registers: int
    spilled_bytes: int
    shared_bytes: int
    access_bits: dict[str, list[int]]  # widths of global accesses, by kind: "load", "store"


def usage(kernel: Any) -> Usage:
    """Registers, spills, shared memory and the width of every global access, from the machine code."""
    if kernel.metadata.target.backend == "hip":
        return _amd_usage(kernel)
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(kernel.asm["cubin"])
        resources = _run("cuobjdump", "-res-usage", str(cubin))
        code = _run("cuobjdump", "-sass", str(cubin))
    numbers = dict(re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", resources))
    widths: dict[str, list[int]] = {"load": [], "store": []}
    for kind, modifiers in re.findall(r"\b(LDG|STG)((?:\.[A-Z0-9]+)*)", code):
        bits = 32
        for modifier in modifiers.split("."):
            bits = {"U8": 8, "S8": 8, "U16": 16, "S16": 16, "64": 64, "128": 128, "256": 256}.get(modifier, bits)
        widths["load" if kind == "LDG" else "store"].append(bits)
    spilled = int(numbers["STACK"]) + int(numbers.get("LOCAL", 0))
    return Usage(int(numbers["REG"]), spilled, kernel.metadata.shared, widths)


def _amd_usage(kernel: Any) -> Usage:
    code = kernel.asm["amdgcn"]

    def number(name: str) -> int:
        found = re.search(rf"\.{name}:\s+(\d+)", code)
        assert found, name
        return int(found[1])

    widths: dict[str, list[int]] = {"load": [], "store": []}
    bits = {"ubyte": 8, "sbyte": 8, "byte": 8, "ushort": 16, "sshort": 16, "short": 16, "dword": 32}
    pattern = r"\b(?:global|buffer)_(load|store)_(ubyte|sbyte|byte|ushort|sshort|short|dword)(?:_d16\w*)?(?:x(\d))?"
    for kind, unit, times in re.findall(pattern, code):
        widths[kind].append(bits[unit] * int(times or 1))
    # a scalar register may be saved in a lane of a vector register, which is not a spill to memory
    spilled = 4 * number("vgpr_spill_count") + number("private_segment_fixed_size")
    return Usage(number("vgpr_count"), spilled, kernel.metadata.shared, widths)


def _run(tool: str, *arguments: str) -> str:
    return subprocess.run([BINARIES / tool, *arguments], capture_output=True, text=True, check=True).stdout
