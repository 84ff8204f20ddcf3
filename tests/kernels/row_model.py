"""A model of the row kernels' speed: what their machine code and a GPU's data sheet say about the bandwidth they reach.

A program reads a row twice and writes its gradient once. Each of these passes is one loop in the machine code, whose
loads, stores, barriers and instructions are counted here. An iteration of a program of 256 threads takes the longest of

    memory      bytes moved / (share of a copy's bandwidth that a multiprocessor has)
    latency     (LATENCY + time of half an iteration) / programs on the multiprocessor: two tiles take turns, so that a
                tile is loaded again half an iteration after it was used up
    issue       instructions of its warps / (schedulers * clock)
    special     exponentials / (special function units * clock)

The share of a copy's bandwidth is the time that the memory needs for all bytes, over the time that the model gives.
"""

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.kernels.compiling import BINARIES

LATENCY = 0.8e-6  # seconds from a load to its data on a busy device: an assumption
COPY_SHARE = 0.92  # of the data sheet's bandwidth that a device copy reaches: an assumption
ROW_GAP = 6 * LATENCY  # per row, without loads of [n, V]: the token's numbers one after the other, the reductions
LAUNCH = 5e-6  # seconds per launch
THREADS = 256  # of a program
L2_BANDWIDTH = 5.5e12  # bytes per second that an H100's L2 cache delivers: an assumption
NEXT_LAUNCH = 2e-6  # seconds from the end of a launch to the start of the next: an assumption


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
    barriers: int  # in the code; those of a gradient that overwrites wider logits run in few iterations only
    shuffles: int


def passes(kernel: Any) -> list[Loop]:
    """The loops of a compiled CUDA kernel that load two tiles of 32 bytes per thread with 128-bit accesses and
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
        if loop.loaded_bytes >= 64 and loop.exponentials >= 8:
            found.append(loop)
            inner_start = start
    return found


def whole(kernel: Any) -> Loop:
    """All of a compiled CUDA kernel without loops."""
    return _count(_instructions(kernel))


def seconds_of_a_tile(kernel: Any, gpu: Gpu, *, num_rows: int, columns: int) -> dict[str, float]:
    """What a launch over one tile of float32 logits in the L2 cache takes, by cause; a program has one row of it."""
    code, numbers = whole(kernel), num_rows * columns
    programs = num_rows / gpu.multiprocessors
    threads = columns // (code.loaded_bytes // 4)
    return {
        "cache": 4 * numbers / L2_BANDWIDTH,
        "memory": numbers * code.stored_bytes / (code.loaded_bytes // 4) / (gpu.bandwidth * COPY_SHARE),
        "issue": programs * code.instructions * threads / 32 / gpu.schedulers / gpu.clock,
        "special": programs * code.exponentials * threads / gpu.special_per_clock / gpu.clock,
    }


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
    moved = {"LDG": 0, "STG": 0}
    for _, name, _ in body:
        kind, *modifiers = name.split(".")
        if kind in moved:
            moved[kind] += max((int(part) // 8 for part in modifiers if part in ("128", "256")), default=0)
    kinds = [name.split(".")[0] for _, name, _ in body]
    return Loop(
        instructions=len(body),
        exponentials=kinds.count("MUFU"),
        loaded_bytes=moved["LDG"],
        stored_bytes=moved["STG"],
        barriers=kinds.count("BAR"),
        shuffles=kinds.count("SHFL"),
    )


@dataclass(frozen=True)
class Prediction:
    """What the model says about a kernel on a GPU."""

    bytes_per_logit: float
    bytes_in_flight: float  # per multiprocessor, in the pass that has fewer
    bound: str  # what takes longest in the slowest pass
    share_of_copy: float


def predict(loops: list[Loop], gpu: Gpu, *, programs: int, itemsize: int, vocab_size: int, num_rows: int) -> Prediction:
    """The prediction for `num_rows` rows of logits of `itemsize` bytes, in one launch."""
    memory_time = model_time = moved = 0.0
    in_flight, bounds = [], []
    for loop in loops:
        columns = THREADS * loop.loaded_bytes // itemsize  # of an iteration
        iterations = vocab_size / columns
        warps = programs * THREADS / 32
        half = loop.instructions / 2 * warps / gpu.schedulers / gpu.clock
        bytes_moved = THREADS * (loop.loaded_bytes + loop.stored_bytes)
        times = {
            "memory": bytes_moved * gpu.multiprocessors / (gpu.bandwidth * COPY_SHARE),
            "latency": (LATENCY + half) / programs,
            "issue": loop.instructions * THREADS / 32 / gpu.schedulers / gpu.clock,
            "special": loop.exponentials * THREADS / gpu.special_per_clock / gpu.clock,
        }
        bound = max(times, key=lambda name: times[name])
        bounds.append((times[bound] / times["memory"], bound))
        in_flight.append(programs * THREADS * loop.loaded_bytes * LATENCY / (LATENCY + half))
        memory_time += iterations * times["memory"]
        model_time += iterations * times[bound]
        moved += iterations * bytes_moved
    rows_each = num_rows / gpu.multiprocessors
    needed = rows_each * memory_time
    given = rows_each * (model_time + ROW_GAP / programs) + LAUNCH
    return Prediction(moved / vocab_size, min(in_flight), max(bounds)[1], needed / given)
