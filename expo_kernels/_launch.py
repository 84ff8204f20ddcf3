"""All that depends on the hardware: chunk and tile sizes, and the choice between Triton kernels and PyTorch."""

import functools
import importlib.util
import math
import os
import platform
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch

from expo_kernels._compat import has_onednn_linear

# Measured on two cores at (V, H) = (32,768, 512) and (65,536, 1,024). Every chunk reads the head twice and adds to
# dWeight: with oneDNN, chunks of H / 8 rows, an eighth of dWeight, take 1.25 times as long as large ones. MKL also
# loses up to a third of its speed to repacking the head and needs H / 3 rows, but no fewer than 176 whatever H is: at
# (32,768, 256) chunks of 86 rows took 1.4 times as long. With small heads the budget of 8 MiB decides.
# With a gradient tolerance every chunk also gathers rows of the head and adds to rows of dWeight: 256 rows take 0.84 to
# 0.95 times as long as 192 at (49,152, 576). MKL rounds by the size of the chunk, so there the exact path has it too.
CPU_LOGITS_BUDGET_MB = 8.0
CPU_ROWS_PER_HIDDEN_ONEDNN = 1 / 8
CPU_LEAST_ROWS_ONEDNN = 128
CPU_ROWS_PER_HIDDEN_MKL = 1 / 3
CPU_LEAST_ROWS_MKL = 256
CPU_LEAST_ROWS_WITH_TOLERANCE = 256
CPU_MOST_ROWS = 512
# rows of an elementwise pass, on all cores together: the whole loss takes 3 to 8 % longer if they exceed this size
CPU_CACHE_BYTES = 2**21
CPU_LEAST_ROWS_IN_CACHE = 4  # with fewer rows, the overhead of the calls exceeds the gain
WIDEN_BYTES = 16 * 2**20  # float32 bytes of head weight cast at once if it is stored in a narrower dtype

# All that a call needs on a GPU besides the gradients: a chunk of logits, and buffers for its products. A chunk of
# 1,024 rows at V = 151,936 takes 594 MiB. Products compute tiles of 128 or 256 rows, so a multiple wastes none of them.
ACCELERATOR_MEMORY_MB = 640.0
ACCELERATOR_ROW_MULTIPLE = 256
# With exponentials a product has 4,096 columns. 1,024 rows give 128 tiles of 128 x 256, for the 132 multiprocessors of
# an H100; 2,048 rows of float32 logits are 32 MiB, which stay in its L2 cache of 50 MB.
EXPONENTIAL_COLUMNS = 4096
EXPONENTIAL_ROW_MULTIPLE, EXPONENTIAL_MOST_ROWS = 1024, 2048
# bytes per feature of each row of hidden states: bfloat16 rows and a float32 product; with split products, halves too
BYTES_PER_FEATURE, SPLIT_BYTES_PER_FEATURE = 8, 16
SPLIT_BYTES = 32 * 2**20  # float32 bytes of a weight or of logits that are split into 16-bit halves at once


def most_rows(
    vocab_size: int,
    *,
    itemsize: int,
    buffers: int,
    budget_mb: float | None,
    device: torch.device,
    hidden_size: int = 0,
    is_split: bool = False,
    has_tolerance: bool = False,
) -> int:
    """Maximum number of rows of a chunk, >= 1, such that `buffers` of [rows, V] fit the budget.

    By default the chunk and the buffers of its products fit `ACCELERATOR_MEMORY_MB` on an accelerator.

    Args:
        vocab_size: V.
        itemsize: bytes per logit.
        buffers: number of [rows, V] buffers that exist at the same time.
        budget_mb: MiB for all of them; None: the default of the device.
        device: the device of the buffers.
        hidden_size: H of the products that compute the logits; 0 if the caller gave the logits.
        is_split: whether these products split operands into halves, which takes memory on an accelerator.
        has_tolerance: whether the gradient products may leave out columns.
    """
    least, bytes_per_row = 1, vocab_size * itemsize * buffers
    if budget_mb is None and device.type == "cpu":
        budget_mb, least = CPU_LOGITS_BUDGET_MB, _least_rows(hidden_size, has_tolerance=has_tolerance)
    elif budget_mb is None:
        budget_mb = ACCELERATOR_MEMORY_MB - (2 * SPLIT_BYTES / 2**20 if is_split else 0.0)
        bytes_per_row += hidden_size * (SPLIT_BYTES_PER_FEATURE if is_split else BYTES_PER_FEATURE)
    most = max(least, int(budget_mb * 2**20) // max(bytes_per_row, 1))
    multiple = row_multiple(device)
    return most // multiple * multiple if most > multiple else most


def most_exponential_rows(vocab_size: int, hidden_size: int, *, budget_mb: float | None, device: torch.device) -> int:
    """Maximum number of rows of a chunk of bfloat16 exponentials, >= 1, with float32 logits of one tile beside them."""
    most = most_rows(
        vocab_size + 2 * exponential_tile(vocab_size).block,
        itemsize=2,
        buffers=1,
        budget_mb=budget_mb,
        device=device,
        hidden_size=hidden_size,
    )
    step = EXPONENTIAL_ROW_MULTIPLE
    return min(most // step * step if most > step else most, EXPONENTIAL_MOST_ROWS)


def row_multiple(device: torch.device) -> int:
    """The number of rows whose multiples fill the tiles of matrix products."""
    return 1 if device.type == "cpu" else ACCELERATOR_ROW_MULTIPLE


def _least_rows(hidden_size: int, *, has_tolerance: bool) -> int:
    """Minimum number of rows for fast products on a CPU; 1 if there are no products."""
    if hidden_size == 0:
        return 1
    if onednn_is_faster():
        wanted = max(math.ceil(hidden_size * CPU_ROWS_PER_HIDDEN_ONEDNN), CPU_LEAST_ROWS_ONEDNN)
    else:
        wanted = max(math.ceil(hidden_size * CPU_ROWS_PER_HIDDEN_MKL), CPU_LEAST_ROWS_MKL)
    if has_tolerance:
        wanted = max(wanted, CPU_LEAST_ROWS_WITH_TOLERANCE)
    return min(wanted, CPU_MOST_ROWS)


def chunk_rows(num_tokens: int, most: int, multiple: int = 1) -> int:
    """Rows per chunk, >= 1 and at most `most`: all chunks have nearly equal sizes, or, but for the last one, a multiple
    of `multiple`."""
    num_chunks = max(1, -(-num_tokens // most))
    num_rows = max(1, -(-num_tokens // num_chunks))
    return min(-(-num_rows // multiple) * multiple, most, max(num_tokens, 1))


def rows_in_cache(rows: torch.Tensor) -> int:
    """Number of rows of [n, V] that an elementwise pass should process at once, >= 1: those that fit a CPU's cache."""
    num_rows, num_columns = rows.shape
    if rows.device.type != "cpu":
        return max(1, num_rows)
    return chunk_rows(num_rows, max(CPU_LEAST_ROWS_IN_CACHE, CPU_CACHE_BYTES // max(num_columns * rows.itemsize, 1)))


def whole_sequences(lengths: Sequence[int], most: int) -> list[range] | None:
    """The consecutive sequences of each chunk of at most `most` rows; None if a single sequence is longer."""
    if max(lengths, default=0) > most:
        return None
    parts, first, num_rows = [], 0, 0
    for sequence, length in enumerate(lengths):
        if num_rows + length > most:
            parts.append(range(first, sequence))
            first, num_rows = sequence, 0
        num_rows += length
    return [*parts, range(first, len(lengths))]


def widen_rows(hidden_size: int, itemsize: int) -> int:
    """Number of rows of the head's weight to cast at once, >= 1."""
    return max(1, WIDEN_BYTES // (max(hidden_size, 1) * itemsize))


def split_rows(num_columns: int) -> int:
    """Number of float32 rows to split into halves at once, >= 1; a multiple of 64, so that blocks are aligned."""
    num_rows = SPLIT_BYTES // (max(num_columns, 1) * 4)
    return num_rows // 64 * 64 if num_rows > 64 else max(1, num_rows)


@functools.cache
def onednn_is_faster() -> bool:
    """Whether oneDNN is the faster library for float32 products here: on AVX-512 CPUs that are not Intel's, where MKL
    uses AVX2 only."""
    if torch.backends.cpu.get_cpu_capability() != "AVX512" or not has_onednn_linear():
        return False
    described = Path("/proc/cpuinfo")
    vendor = described.read_text() if described.exists() else platform.processor()
    return "GenuineIntel" not in vendor


_switch = SimpleNamespace(kernels_on_cpu=False)  # for tests, under TRITON_INTERPRET=1
_HAS_TRITON = importlib.util.find_spec("triton") is not None

MOST_PROGRAMS = 1024  # maximum of one launch, on any device
# A program of 8 warps has one or two tiles of 8 KiB in flight: with three programs 24 to 48 KiB on a multiprocessor,
# where an H100 needs 20 KiB for its memory bandwidth at a latency of 0.8 microseconds.
ROW_TILE_BYTES = 2**13
BYTES_PER_WARP = 2**10
BYTES_PER_WAVE = 2**11  # AMD's warps have 64 lanes
LEAST_COLUMNS = 128
PROGRAMS_PER_MULTIPROCESSOR = 3
REGISTERS_PER_MULTIPROCESSOR = 2**16
THREADS_PER_PROGRAM = 256


class Tile(NamedTuple):
    """The block size and the number of warps of a program."""

    block: int  # elements at once
    num_warps: int


def use_kernels(*tensors: torch.Tensor | None) -> bool:
    """Whether the Triton kernels run for these tensors: on CUDA and HIP, but not in float64, which they would round.

    EXPO_KERNELS_TRITON=0 in the environment selects PyTorch on every device.
    """
    given = [tensor for tensor in tensors if tensor is not None]
    if not _HAS_TRITON or os.environ.get("EXPO_KERNELS_TRITON") == "0":
        return False
    if any(tensor.dtype == torch.float64 for tensor in given):
        return False
    return all(tensor.device.type == "cuda" or _switch.kernels_on_cpu for tensor in given)


def keeps_exponentials() -> bool:
    """Whether bfloat16 heads on a GPU keep bfloat16 exponentials of their logits: EXPO_KERNELS_EXPONENTIALS=1 in the
    environment."""
    return os.environ.get("EXPO_KERNELS_EXPONENTIALS", "0") not in ("", "0")


def current(device: torch.device) -> AbstractContextManager[Any]:
    """A context in which Triton launches on `device`."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def row_tile(vocab_size: int, itemsize: int) -> Tile:
    """The tile for rows of logits of `itemsize` bytes; the block counts columns."""
    columns = max(1 << (max(vocab_size, 1) - 1).bit_length(), LEAST_COLUMNS)
    block = min(columns, ROW_TILE_BYTES // itemsize)
    return Tile(block, max(1, block * itemsize // (BYTES_PER_WAVE if is_amd() else BYTES_PER_WARP)))


def most_registers(programs: int) -> int:
    """Maximum number of registers per thread with which that many programs of 8 warps fit a multiprocessor."""
    return REGISTERS_PER_MULTIPROCESSOR // (programs * THREADS_PER_PROGRAM) // 8 * 8


def is_amd() -> bool:
    """Whether this build of PyTorch is for AMD's GPUs."""
    return torch.version.hip is not None


class BlockTile(NamedTuple):
    """A block of rows and columns, and the number of warps of a program."""

    num_rows: int
    num_columns: int
    num_warps: int


def column_tile() -> BlockTile:
    """The tile for sums over the rows of [n, V], 16 values per thread: a row of it is 128 bytes of bfloat16."""
    return BlockTile(32, 64, 2 if is_amd() else 4)


def exponential_tile(vocab_size: int) -> Tile:
    """The tile of exponentials: columns of one product, of which a program has one row; 16 per thread."""
    columns = max(1 << (max(vocab_size, 1) - 1).bit_length(), LEAST_COLUMNS)
    block = min(columns, EXPONENTIAL_COLUMNS)
    return Tile(block, max(1, block // (1024 if is_amd() else 512)))


def sequence_tile() -> Tile:
    """The tile for sequences; the block counts positions: four per thread, since with eight Triton 3.4 and 3.6 need 150
    registers."""
    return Tile(1024, 8)


def token_tile() -> Tile:
    """The tile for a few numbers of each row; the block counts rows, and is small, so that those of one chunk occupy
    many multiprocessors."""
    return Tile(256, 4)


def flat_tile() -> Tile:
    """The tile for elementwise kernels; the block counts elements."""
    return Tile(4096, 8)


def curriculum_tile() -> Tile:
    """The tile for the curriculum's kernels; the block counts questions: two per thread, since a float64 takes two
    registers."""
    return Tile(256, 4)


def most_programs(device: torch.device, per_multiprocessor: int = PROGRAMS_PER_MULTIPROCESSOR) -> int:
    """Maximum grid size of persistent kernels, whose programs process many rows each."""
    if device.type != "cuda":
        return 4
    count = torch.cuda.get_device_properties(device).multi_processor_count
    return min(int(count) * per_multiprocessor, MOST_PROGRAMS)
