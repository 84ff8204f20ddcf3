"""A model of the row kernels' speed: what their machine code and a GPU's data sheet say about the bandwidth they reach.

A row is read twice and its gradient is written once. Each of these passes is one loop in the machine code, whose loads,
stores, barriers and instructions are counted here. A multiprocessor has loads in flight all the time if each iteration
issues the loads of a later one before it uses its own. Then (Little's law) the bytes in flight, divided by the latency
of the memory, bound the bandwidth; the issue slots and the special function units bound it too.
"""

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.kernels.compiling import BINARIES

LATENCY = 0.8e-6  # seconds from a load to its data under load; an assumption, above the 0.5 to 0.7 measured idle
COPY_SHARE = 0.92  # a device copy reaches this share of the data sheet's bandwidth
ROW_GAP = 6 * LATENCY  # between the passes over a row: the chosen logit, the token's numbers, two reductions
LAUNCH = 5e-6  # seconds


@dataclass(frozen=True)
class Gpu:
    """Numbers of a data sheet."""

    capability: str
    multiprocessors: int
    bandwidth: float  # bytes per second
    clock: float  # boost, Hz
    special_per_clock: int = 16  # exponentials per multiprocessor and clock
    schedulers: int = 4  # instructions of 32 threads per multiprocessor and clock


GPUS = {
    "A100": Gpu("sm_80", 108, 2.04e12, 1.41e9),
    "H100": Gpu("sm_90", 132, 3.35e12, 1.83e9),
    "H200": Gpu("sm_90", 132, 4.80e12, 1.83e9),
    "B200": Gpu("sm_100", 148, 8.00e12, 1.96e9),
}


@dataclass(frozen=True)
class Loop:
    """One pass over a row, per iteration and thread."""

    instructions: int
    exponentials: int
    loaded_bytes: int
    stored_bytes: int
    barriers: int  # in the code; the gradient's loop executes its own in few iterations only
    shuffles: int
    uses_own_loads: bool  # whether an iteration waits for loads that it issued itself


def passes(kernel: Any) -> list[Loop]:
    """The loops of a compiled CUDA kernel that load or store at least 32 bytes per thread with 128-bit accesses and
    compute exponentials: the passes over a row, in order."""
    code = _instructions(kernel)
    at = {address: number for number, (address, *_) in enumerate(code)}
    found, inner_start = [], -1
    for number, (address, name, operands) in enumerate(code):
        target = re.search(r"0x([0-9a-f]+)", operands) if name.startswith("BRA") else None
        if target is None or int(target[1], 16) > address or int(target[1], 16) not in at:
            continue
        start = at[int(target[1], 16)]
        body = code[start : number + 1]
        if start <= inner_start:
            continue  # a loop around one that is counted already
        loop = _count(body)
        if loop.loaded_bytes >= 32 and loop.exponentials >= 8:
            found.append(loop)
            inner_start = start
    return found


def _instructions(kernel: Any) -> list[tuple[int, str, str]]:
    """Address, name and operands of each instruction."""
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(kernel.asm["cubin"])
        command = [BINARIES / "cuobjdump", "-sass", str(cubin)]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    pattern = r"/\*([0-9a-f]{4,5})\*/\s+(?:@!?U?P\w+\s+)?([A-Z0-9_.]+)([^;]*);"
    return [(int(address, 16), name, operands) for address, name, operands in re.findall(pattern, text)]


def _count(body: list[tuple[int, str, str]]) -> Loop:
    counts = {"LDG": 0, "STG": 0}
    loaded: set[str] = set()
    uses_own = False
    for _, name, operands in body:
        registers = re.findall(r"\bR(\d+)\b", operands)
        if name.startswith(("LDG", "STG")):
            bits = next((int(part) for part in name.split(".") if part in ("64", "128", "256")), 32)
            counts[name[:3]] += bits // 8 if bits >= 64 else 0
            if name.startswith("LDG") and bits >= 128:
                first = int(registers[0])
                loaded |= {str(first + offset) for offset in range(bits // 32)}
                continue
        if loaded & set(registers[1:]) and name.split(".")[0] in ("FADD", "FMNMX", "FMNMX3", "FMUL", "PRMT", "FFMA"):
            uses_own = True
    kinds = [name.split(".")[0] for _, name, _ in body]
    return Loop(
        instructions=len(body),
        exponentials=kinds.count("MUFU"),
        loaded_bytes=counts["LDG"],
        stored_bytes=counts["STG"],
        barriers=kinds.count("BAR"),
        shuffles=kinds.count("SHFL"),
        uses_own_loads=uses_own,
    )
