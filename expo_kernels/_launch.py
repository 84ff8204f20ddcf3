"""Chunk and tile sizes, kernels or PyTorch: all that depends on the hardware."""

import importlib.util
import os
from contextlib import AbstractContextManager, nullcontext
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch

# On CPU products of few rows lose up to a third of their speed to repacking the head, and beyond H / 3 rows little is
# gained: measured on two cores at (V, H) = (32,768, 512) and (65,536, 1,024). So large a chunk is a third of dWeight,
# which is held in any case. Small heads fill 16 MiB.
CPU_LOGITS_BUDGET_MB = 16.0
CPU_MOST_ROWS = 512
ACCELERATOR_LOGITS_BUDGET_MB = 512.0
WIDEN_BYTES = 16 * 2**20  # float32 bytes of head weight held at once when it is stored in a narrower dtype


def chunk_rows(
    num_tokens: int,
    vocab_size: int,
    *,
    itemsize: int,
    buffers: int,
    budget_mb: float | None,
    device: torch.device,
    hidden_size: int = 0,
) -> int:
    """Rows per chunk, >= 1, such that `buffers` of [rows, V] fit the budget; chunks come out nearly equal.

    Args:
        num_tokens: valid tokens in all.
        vocab_size: V.
        itemsize: bytes per logit.
        buffers: [rows, V] buffers alive at once.
        budget_mb: MiB for them together; None: the default of the device.
        device: where they live.
        hidden_size: H of the products that make the logits; 0 where they are ready.
    """
    least = 1
    if budget_mb is None and device.type == "cpu":
        budget_mb, least = CPU_LOGITS_BUDGET_MB, max(1, min(-(-hidden_size // 3), CPU_MOST_ROWS))
    elif budget_mb is None:
        budget_mb = ACCELERATOR_LOGITS_BUDGET_MB
    most = max(least, int(budget_mb * 2**20) // max(vocab_size * itemsize * buffers, 1))
    num_chunks = max(1, -(-num_tokens // most))
    return max(1, -(-num_tokens // num_chunks))


def widen_rows(hidden_size: int, itemsize: int) -> int:
    """Rows of the head's weight to widen at once, >= 1."""
    return max(1, WIDEN_BYTES // (max(hidden_size, 1) * itemsize))


_switch = SimpleNamespace(kernels_on_cpu=False)  # for tests, under TRITON_INTERPRET=1
_HAS_TRITON = importlib.util.find_spec("triton") is not None

MOST_PROGRAMS = 1024  # of one launch, on any device
# rows in flight: enough loads to fill the bus, and few enough that some of a row's second read may hit the L2 cache
PROGRAMS_PER_MULTIPROCESSOR = 2
MOST_COLUMNS = 4096  # with 8 warps 16 float32 a thread: four 128-bit loads in flight, 128 registers suffice


class Tile(NamedTuple):
    """How one program works."""

    block: int  # elements at once
    num_warps: int


def use_kernels(*tensors: torch.Tensor | None) -> bool:
    """Whether Triton takes these: on CUDA and HIP, but never float64, which kernels would narrow.

    EXPO_KERNELS_TRITON=0 in the environment keeps to PyTorch everywhere.
    """
    given = [tensor for tensor in tensors if tensor is not None]
    if not _HAS_TRITON or os.environ.get("EXPO_KERNELS_TRITON") == "0":
        return False
    if any(tensor.dtype == torch.float64 for tensor in given):
        return False
    return all(tensor.device.type == "cuda" or _switch.kernels_on_cpu for tensor in given)


def current(device: torch.device) -> AbstractContextManager[Any]:
    """Make `device` the one that Triton launches on."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def row_tile(vocab_size: int) -> Tile:
    """Columns of a row of logits read at once."""
    block = min(max(1 << (max(vocab_size, 1) - 1).bit_length(), 128), MOST_COLUMNS)
    return Tile(block, max(1, block // 512))


def sequence_tile() -> Tile:
    """Positions of a sequence read at once."""
    return Tile(1024, 4)


def flat_tile() -> Tile:
    """Elements of an element-wise kernel's program."""
    return Tile(4096, 8)


def curriculum_tile() -> Tile:
    """Questions of a program of the curriculum's kernels: two a thread, since float64 takes two registers each."""
    return Tile(256, 4)


def most_programs(device: torch.device) -> int:
    """Programs that run at once on the device: the grid of kernels whose programs take many rows each."""
    if device.type != "cuda":
        return 4
    count = torch.cuda.get_device_properties(device).multi_processor_count
    return min(int(count) * PROGRAMS_PER_MULTIPROCESSOR, MOST_PROGRAMS)
