"""The memory of a launch's tensors and of a thread block, with the checks of every access."""

import ctypes
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from tests.ptx.program import I4, I8, U1, U8, UNSIGNED

WARP = 32  # lanes
ALIGNMENT = 16  # bytes of the widest access


class TensorElements:
    """Which addresses are elements of a tensor."""

    def __init__(self, name: str, tensor: Tensor) -> None:
        self.name, self.itemsize, self.start = name, tensor.element_size(), tensor.data_ptr()
        dimensions = [
            (stride * self.itemsize, size)
            for stride, size in zip(tensor.stride(), tensor.shape, strict=True)
            if size > 1
        ]
        span = sum((size - 1) * stride for stride, size in dimensions) + self.itemsize
        self.end = self.start + span
        self._dimensions: list[tuple[int, int]] | None = None  # None: every address from start to end
        if span != tensor.numel() * self.itemsize:
            dimensions.sort(reverse=True)
            inner = [
                sum((size - 1) * stride for stride, size in dimensions[depth + 1 :]) + self.itemsize
                for depth in range(len(dimensions))
            ]
            if all(stride >= span for (stride, _), span in zip(dimensions, inner, strict=True)):
                self._dimensions = dimensions  # else elements overlap

    def contain(self, address: np.ndarray, num_bytes: int) -> np.ndarray:
        """Whether the bytes at each address are elements of one row."""
        if self.end - self.start < num_bytes:
            return np.zeros(address.shape, bool)
        inside = (address >= self.start) & (address <= U8(self.end - num_bytes))
        if self._dimensions is None or not inside.any():
            return inside
        offset = np.where(inside, address - U8(self.start), U8(0))
        for stride, size in self._dimensions:
            if stride == self.itemsize:
                return inside & (offset + U8(num_bytes) <= U8(size * self.itemsize))
            index = offset // U8(stride)
            inside = inside & (index < U8(size))
            offset = offset - index * U8(stride)
        return inside & (offset + U8(num_bytes) <= U8(self.itemsize))


@dataclass
class Span:
    """Memory of tensors that overlap each other, or of one."""

    start: int
    end: int
    number: int = 0

    def __post_init__(self) -> None:
        self.base = self.start // ALIGNMENT * ALIGNMENT
        self.top = -(-self.end // ALIGNMENT) * ALIGNMENT
        memory = np.ctypeslib.as_array((ctypes.c_uint8 * (self.top - self.base)).from_address(self.base))
        self.words = {size: memory.view(dtype) for size, dtype in UNSIGNED.items()}
        # without what is beside the tensors and belongs to others
        self.bytes = memory[self.start - self.base : self.end - self.base]


class GlobalMemory:
    """The memory of the tensors that a launch received."""

    def __init__(self, tensors: Iterable[tuple[str, Tensor]]) -> None:
        self.tensors = [TensorElements(name, tensor) for name, tensor in tensors if tensor.numel()]
        ranges: list[list[int]] = []
        for start, end in sorted((tensor.start, tensor.end) for tensor in self.tensors):
            if ranges and start < ranges[-1][1]:
                ranges[-1][1] = max(ranges[-1][1], end)
            else:
                ranges.append([start, end])
        self.spans = [Span(start, end, number) for number, (start, end) in enumerate(ranges)]

    def find(self, address: np.ndarray, num_bytes: int) -> tuple[np.ndarray, Span | None]:
        """Whether each lane's access is to a tensor's elements, and the memory of the first that is."""
        inside = np.zeros(address.shape, bool)
        for tensor in self.tensors:
            inside |= tensor.contain(address, num_bytes)
            if inside.all():
                break
        if not inside.any():
            return inside, None
        first = int(address[inside][0])
        return inside, next(span for span in self.spans if span.base <= first < span.top)

    def describe(self, address: int) -> str:
        """The address relative to the nearest tensor."""
        nearest = min(self.tensors, key=lambda tensor: max(tensor.start - address, address - tensor.end + 1, 0))
        return f"{nearest.name} {address - nearest.start:+d} (of {nearest.end - nearest.start} bytes)"

    def names_at(self, address: int) -> str:
        """The tensors to which an address belongs."""
        return "/".join(sorted({tensor.name for tensor in self.tensors if tensor.start <= address < tensor.end}))

    def copy(self) -> list[np.ndarray]:
        """What the tensors hold."""
        return [span.bytes.copy() for span in self.spans]

    def restore(self, copies: list[np.ndarray]) -> None:
        """Make the tensors hold what they held."""
        for span, copied in zip(self.spans, copies, strict=True):
            span.bytes[:] = copied

    @property
    def num_bytes(self) -> int:
        """Size of all tensors."""
        return sum(span.end - span.start for span in self.spans)


class SharedMemory:
    """The shared memory of a thread block, and who accessed each byte since the last barrier."""

    def __init__(self, size: int, num_warps: int) -> None:
        self.size = size
        memory = np.full(-(-max(size, 1) // ALIGNMENT) * ALIGNMENT, 0xA5, U1)
        self.words = {itemsize: memory.view(dtype) for itemsize, dtype in UNSIGNED.items()}
        self.is_written = np.zeros(memory.size, bool)
        # instruction + 1 of the last access by each warp
        self.readers = np.zeros((memory.size, num_warps), I4)
        self.writers = np.zeros_like(self.readers)
        self.is_stored, self.differs = np.zeros((2, memory.size), bool)  # `differs`: two stores of different values

    def contains(self, address: np.ndarray, num_bytes: int) -> np.ndarray:
        """Whether each lane's access is in bounds."""
        if self.size < num_bytes:
            return np.zeros(address.shape, bool)
        return address <= self.size - num_bytes

    def note_store(self, index: np.ndarray, values: np.ndarray, itemsize: int) -> None:
        """Store words, and note which bytes receive different values."""
        words, first = self.words[itemsize], index * itemsize
        clashes = self.is_stored[first] & (words[index] != values)
        words[index] = values
        clashes |= words[index] != values
        for byte in range(itemsize):
            self.is_stored[first + byte] = True
            self.differs[(first + byte)[clashes]] = True

    def races(self) -> Iterable[tuple[bool, int, int, int, int]]:
        """Conflicting accesses since the last barrier: whether all stores were of equal values, first byte, number of
        bytes, the instruction that writes it and the other one."""
        wrote = self.writers != 0
        if not wrote.any():
            return
        touched = wrote | (self.readers != 0)
        conflicts = wrote.any(1) & (touched.sum(1) > 1)
        # several warps may store the same number, as Triton's reductions do
        equal = ~self.differs & (wrote.sum(1) == touched.sum(1))
        for are_equal, bad in ((False, conflicts & ~equal), (True, conflicts & equal)):
            if bad.any():
                byte = int(np.flatnonzero(bad)[0])
                writer = int(np.flatnonzero(wrote[byte])[0])
                other = next(int(warp) for warp in np.flatnonzero(touched[byte]) if warp != writer)
                second = int(self.writers[byte, other] or self.readers[byte, other]) - 1
                yield are_equal, byte, int(bad.sum()), int(self.writers[byte, writer]) - 1, second

    def start_epoch(self) -> None:
        """Forget accesses: a barrier orders them before all later ones."""
        for array in (self.readers, self.writers, self.is_stored, self.differs):
            array[:] = 0

    def note_access(self, first: np.ndarray, num_bytes: int, warp: np.ndarray, instruction: int, writes: bool) -> bool:
        """Record who accesses these bytes; whether all bytes that are read have been written."""
        initialised = True
        accessed = self.writers if writes else self.readers
        for byte in range(num_bytes):
            if writes:
                self.is_written[first + byte] = True
            else:
                initialised &= bool(self.is_written[first + byte].all())
            accessed[first + byte, warp] = instruction + 1
        return initialised


def as_index(address: np.ndarray) -> np.ndarray:
    """Addresses as numpy's indices."""
    return address.astype(I8)
