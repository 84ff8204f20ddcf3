"""Lanes that execute together: their registers, their control flow, and what translated code calls.

A group is one warp, or all warps of a thread block in lockstep. Where lanes diverge, those with the smallest block
number go first, until they meet again.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Literal, TypeAlias

import numpy as np

from tests.ptx.memory import WARP, as_index
from tests.ptx.program import AT_BARRIER, EXIT, I8, U4, U8, UNSIGNED, EmulatorError
from tests.ptx.races import ATOMIC, READ, WRITE, Access
from tests.ptx.report import DIVERGENT, MISALIGNED, OUT_OF_BOUNDS, UNINITIALISED

if TYPE_CHECKING:
    from tests.ptx.launch import ThreadBlock

Lanes: TypeAlias = np.ndarray  # one entry per lane, or per lane that executes an instruction
Mask: TypeAlias = np.ndarray | None  # the lanes that execute an instruction; None: all
_ALL_LANES = U4(0xFFFFFFFF)
_REDUCTIONS = {
    **{"add": np.add, "min": np.minimum, "max": np.maximum},
    **{"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor},
}
_GARBAGE = 0x7FBADBAD7FBADBAD  # registers before they are written


def _uninitialised(num_lanes: int, dtype: type) -> Lanes:
    if dtype is np.bool_:
        return np.zeros(num_lanes, bool)
    return np.full(num_lanes, _GARBAGE & ((1 << 8 * np.dtype(dtype).itemsize) - 1), dtype)


class LaneGroup:
    """Some lanes of a thread block, and how far they are."""

    def __init__(self, block: ThreadBlock, number: int) -> None:
        launch = block.launch
        self.launch, self.block = launch, block
        num_lanes, num_threads = launch.lanes_per_group, WARP * launch.kernel.num_warps
        thread = np.arange(number * num_lanes, (number + 1) * num_lanes, dtype=U4)
        zero, one = np.zeros(num_lanes, U4), np.ones(num_lanes, U4)
        self.special = {
            **{"tid.x": thread, "tid.y": zero, "tid.z": zero, "ntid.x": one * U4(num_threads)},
            **{"ctaid.x": one * U4(block.number), "ctaid.y": zero, "ctaid.z": zero},
            **{"nctaid.x": one * U4(launch.grid), "nctaid.y": one, "nctaid.z": one},
        }
        self.warp_in_block = (thread // WARP).astype(I8)
        self.warp = self.warp_in_block + block.warps[0]
        self.thread = thread.astype(I8) + block.number * num_threads
        # registers are replaced, never changed in place, so that all of a dtype begin as one array
        garbage = {dtype: _uninitialised(num_lanes, dtype) for dtype in set(launch.code.dtypes)}
        self.registers = [garbage[dtype] for dtype in launch.code.dtypes]
        self.refresh_clocks()
        self.steps = self._run()

    def refresh_clocks(self) -> None:
        """Take over the clocks of the warps after they advanced."""
        self.time, self.converged = self.launch.clocks.time[self.warp], self.launch.clocks.converged[self.warp]

    # --- control flow

    def _run(self) -> Iterator[Literal["barrier", "block"]]:
        """Execute block after block; says when a block has ended and when all lanes wait at a barrier."""
        code, executed = self.launch.code, self.launch.executed
        next_block, next_blocks = 0, None  # of all lanes, or, where they diverge, of each
        while True:
            if next_blocks is None:
                if next_block >= EXIT:
                    return
                if next_block >= AT_BARRIER:
                    yield "barrier"
                    next_block -= AT_BARRIER
                executed["blocks"] += 1
                outcome = code.whole[next_block](self.registers, self)
                if isinstance(outcome, int):
                    next_block = outcome
                else:
                    taken, target, other = outcome
                    if taken.all():
                        next_block = target
                    elif not taken.any():
                        next_block = other
                    else:
                        next_blocks = np.where(taken, target, other)
                        executed["divergent branches"] += 1
            else:
                if not (next_blocks < AT_BARRIER).any():
                    self._check_same_barrier(next_blocks)
                    yield "barrier"
                    next_blocks = np.where(next_blocks < EXIT, next_blocks - AT_BARRIER, next_blocks)
                number = int(next_blocks[next_blocks < AT_BARRIER].min())
                mask = next_blocks == number
                executed["blocks under a mask"] += 1
                outcome = code.masked[number](self.registers, self, mask)
                following = outcome if isinstance(outcome, int) else np.where(*outcome)
                next_blocks = np.where(mask, following, next_blocks)
                if (next_blocks == next_blocks[0]).all():
                    next_block, next_blocks = int(next_blocks[0]), None
            yield "block"

    def _check_same_barrier(self, next_blocks: np.ndarray) -> None:
        waiting = next_blocks < EXIT
        if not waiting.all():
            self.block.note_missed_barrier()
        of_warps = waiting.reshape(-1, WARP)
        if (of_warps.any(1) != of_warps.all(1)).any() or len(set(next_blocks[waiting].tolist())) > 1:
            raise EmulatorError(
                f"{self.launch.kernel.program.name}: some lanes wait at a barrier while others wait at another one or "
                "have exited; a barrier must be reached by all lanes"
            )

    # --- instructions of a whole warp

    def converge(self, mask: Mask, instruction: int) -> None:
        """All lanes of each warp that executes this must execute it; earlier accesses happen before later ones."""
        warps = self.warp[::WARP]
        if mask is not None:
            of_warps = mask.reshape(-1, WARP)
            if (of_warps.any(1) != of_warps.all(1)).any():
                self.launch.note(DIVERGENT, instruction, "some lanes of a warp do not execute it")
            warps = warps[of_warps.any(1)]
        self.launch.clocks.converged[warps] += 1
        self.converged = self.launch.clocks.converged[self.warp]

    def shuffle(
        self, mode: str, values: Lanes, by: Lanes, clamp: Lanes, members: Lanes, mask: Mask, instruction: int
    ) -> Lanes:
        """`shfl.sync`."""
        self._converge_all(members, mask, instruction)
        lane = np.arange(WARP)
        by, clamp = (as_index(operand).reshape(-1, WARP) for operand in (by, clamp))
        segment, limit = (clamp >> 8) & 31, clamp & 31
        by, bound = by & 31, (lane & segment) | (limit & ~segment)
        sources = {"bfly": lane ^ by, "up": lane - by, "down": lane + by, "idx": (lane & segment) | (by & ~segment)}
        source = sources[mode]
        # where the source is out of bounds, a lane keeps its own value
        source = np.where(source >= bound if mode == "up" else source <= bound, source, lane)
        return np.take_along_axis(values.reshape(-1, WARP), source, axis=1).ravel()

    def reduce_warp(self, operation: str, values: Lanes, members: Lanes, mask: Mask, instruction: int) -> Lanes:
        """`redux.sync`: every lane receives the reduction of its warp."""
        self._converge_all(members, mask, instruction)
        name, *modifiers = operation.split(".")
        of_warps = values.reshape(-1, WARP)
        if values.dtype.kind != "f":
            out = _REDUCTIONS[name].reduce(of_warps, axis=1, dtype=values.dtype)
        elif "NaN" in modifiers:
            out = _REDUCTIONS[name].reduce(of_warps, axis=1)
        else:  # NaN counts as missing
            out = {"min": np.fmin, "max": np.fmax}[name].reduce(of_warps, axis=1)
        return np.repeat(out, WARP)

    def _converge_all(self, members: Lanes, mask: Mask, instruction: int) -> None:
        self.converge(mask, instruction)
        if (members[:1] != _ALL_LANES).any():
            raise EmulatorError("a warp instruction of only some lanes is not implemented")

    # --- memory

    def parameter(self, index: int, dtype: type) -> Lanes:
        """A kernel argument."""
        return np.full(self.launch.lanes_per_group, self.launch.arguments[index], dtype)

    def load(self, space: str, address: Lanes, size: int, count: int, mask: Mask, instruction: int) -> list[Lanes]:
        """`count` arrays of unsigned integers of `size` bytes; 0 in lanes that do not load."""
        mask = None if mask is not None and mask.all() else mask
        out = [np.zeros(self.launch.lanes_per_group, UNSIGNED[size]) for _ in range(count)]
        if mask is not None and not mask.any():
            return out
        active = slice(None) if mask is None else mask
        index, valid, words = self._access(space, address[active], size, count, mask, instruction, READ)
        for part, whole in enumerate(out):
            loaded = np.zeros(valid.size, UNSIGNED[size])
            loaded[valid] = words[index + part]
            whole[active] = loaded
        return out

    def load_matrices(
        self, address: Lanes, count: int, is_transposed: bool, mask: Mask, instruction: int
    ) -> list[Lanes]:
        """`ldmatrix` of 8 x 8 matrices of 16 bits: lane 8 k + r has the address of row r of matrix k."""
        self.converge(mask, instruction)
        lane, rows = np.arange(WARP), address.reshape(-1, WARP)
        if (rows[:, : 8 * count] % 16 != 0).any():
            self.launch.note(MISALIGNED, instruction, "a row of a matrix is not at a multiple of 16 bytes")

        def read(matrix: int, row: np.ndarray, column: np.ndarray, size: int) -> Lanes:
            at = rows[:, 8 * matrix + row] + (2 * column).astype(address.dtype)
            return self.load("shared", at.ravel(), size, 1, mask, instruction)[0]

        if not is_transposed:
            return [read(matrix, lane // 4, lane % 4 * 2, 4) for matrix in range(count)]
        halves = [[read(matrix, lane % 4 * 2 + half, lane // 4, 2) for half in (0, 1)] for matrix in range(count)]
        return [low.astype(U4) | (high.astype(U4) << U4(16)) for low, high in halves]

    def store(
        self, space: str, address: Lanes, size: int, values: Sequence[Lanes], mask: Mask, instruction: int
    ) -> None:
        """Store arrays of `size` bytes side by side."""
        mask = None if mask is not None and mask.all() else mask
        if mask is not None and not mask.any():
            return
        active = slice(None) if mask is None else mask
        index, valid, words = self._access(space, address[active], size, len(values), mask, instruction, WRITE)
        for part, value in enumerate(values):
            stored = value[active][valid]
            if space == "shared":
                self.block.shared.note_store(index + part, stored, size)
            else:
                words[index + part] = stored

    def atomic_add(self, address: Lanes, values: Lanes, is_ordered: bool, mask: Mask, instruction: int) -> Lanes:
        """`atom.add` of 32 bits: what each lane's memory held; with acquire-release order if `is_ordered`."""
        out = np.zeros(self.launch.lanes_per_group, U4)
        for lane in range(out.size) if mask is None else np.flatnonzero(mask):
            alone = np.zeros(out.size, bool)
            alone[lane] = True
            index, valid, words = self._access("global", address[alone], 4, 1, alone, instruction, ATOMIC)
            if not valid.all():
                continue
            out[lane] = words[index[0]]
            words[index[0]] += values[lane]
            self.launch.executed["atomics"] += 1
            if is_ordered:
                self.launch.clocks.atomic(int(self.warp[lane]), int(address[lane]))
                self.refresh_clocks()
        return out

    def _access(
        self, space: str, address: Lanes, size: int, count: int, mask: Mask, instruction: int, kind: int
    ) -> tuple[Lanes, Lanes, Lanes]:
        """Check the accesses of active lanes; index of the first word of the valid ones, which are valid, and the
        memory as words."""
        launch, num_bytes = self.launch, size * count
        launch.executed[f"{space} accesses"] += address.size
        misaligned = address % address.dtype.type(num_bytes) != 0
        if misaligned.any():
            launch.note(MISALIGNED, instruction, f"{num_bytes} bytes at {int(address[misaligned][0]):#x}")
        if space == "shared":
            return self._access_shared(address, size, num_bytes, mask, instruction, kind)
        valid, span = launch.memory.find(address, num_bytes)
        if not valid.all():
            where = launch.memory.describe(int(address[~valid][0]))
            what = "read" if kind == READ else "write"
            launch.note(OUT_OF_BOUNDS, instruction, f"{what} of {num_bytes} bytes at {where}, {(~valid).sum()} lanes")
        if span is None:
            return np.zeros(0, I8), valid, np.zeros(0, UNSIGNED[size])
        if not ((address[valid] >= U8(span.base)) & (address[valid] < U8(span.top))).all():
            raise EmulatorError("one instruction that accesses two tensors is not implemented")
        of_lanes = (array if mask is None else array[mask] for array in (self.thread, self.time, self.converged))
        launch.accesses.append(Access(span.number, kind, instruction, num_bytes, address, *of_lanes))
        return as_index((address[valid] - U8(span.base)) // U8(size)), valid, span.words[size]

    def _access_shared(
        self, address: Lanes, size: int, num_bytes: int, mask: Mask, instruction: int, kind: int
    ) -> tuple[Lanes, Lanes, Lanes]:
        launch, shared = self.launch, self.block.shared
        valid = shared.contains(address, num_bytes)
        if not valid.all():
            first = int(address[~valid][0])
            launch.note(OUT_OF_BOUNDS, instruction, f"byte {first} of {shared.size} bytes of shared memory")
        byte = as_index(address[valid])
        warp = (self.warp_in_block if mask is None else self.warp_in_block[mask])[valid]
        if not shared.note_access(byte, num_bytes, warp, instruction, writes=kind == WRITE):
            launch.note(UNINITIALISED, instruction, f"from byte {int(byte[0])} on")
        return byte // size, valid, shared.words[size]
