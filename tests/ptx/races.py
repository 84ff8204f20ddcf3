"""Data races in global memory: accesses of one byte, one of them a write, neither of which happens before the other.

Warps have vector clocks, which barriers join, and acquire-release atomics between warps that use the same address.
Lanes of one warp are ordered only by instructions that make the warp converge: shuffles, reductions, barriers.
Whether two accesses are ordered does not depend on the schedule, so that one schedule shows every race of the accesses
that it executes.
"""

from typing import NamedTuple

import numpy as np

from tests.ptx.memory import WARP, GlobalMemory
from tests.ptx.program import I4, I8
from tests.ptx.report import RACE, SAME_STORE, WITHIN_A_WARP

READ, WRITE, ATOMIC = 0, 1, 2


class Clocks:
    """Vector clocks of all warps of a launch."""

    def __init__(self, num_warps: int) -> None:
        self.num_warps = num_warps
        self.time = np.ones(num_warps, I4)
        self.vectors = np.eye(num_warps, dtype=I4)  # [warp, other]: the last time of the other that it knows of
        self.converged = np.zeros(num_warps, I4)  # how often the lanes of each warp converged
        self._history = [[self.vectors[warp] * 0, self.vectors[warp].copy()] for warp in range(num_warps)]
        self._released: dict[int, np.ndarray] = {}  # address of an atomic -> vector

    def _advance(self, warps: list[int]) -> None:
        for warp in warps:
            self.time[warp] += 1
            self.vectors[warp, warp] = self.time[warp]
            self._history[warp].append(self.vectors[warp].copy())

    def barrier(self, warps: list[int]) -> None:
        """All that these warps did happens before all that they will do."""
        self.vectors[warps] = self.vectors[warps].max(axis=0)
        self._advance(warps)

    def atomic(self, warp: int, address: int) -> None:
        """An acquire-release atomic: all before earlier ones on this address happens before what follows."""
        joined = np.maximum(self.vectors[warp], self._released.get(address, 0))
        self.vectors[warp] = joined
        self._released[address] = joined.copy()
        self._advance([warp])

    def table(self) -> np.ndarray:
        """[warp, time, other warp]: the vectors at every time."""
        table = np.zeros((self.num_warps, max(map(len, self._history)), self.num_warps), I4)
        for warp, vectors in enumerate(self._history):
            table[warp, : len(vectors)] = np.stack(vectors)
        return table


class Access(NamedTuple):
    """One instruction's accesses to one span of memory, one entry per active lane."""

    span: int
    kind: int
    instruction: int
    num_bytes: int
    address: np.ndarray
    thread: np.ndarray
    time: np.ndarray  # of the lane's warp
    converged: np.ndarray


class Race(NamedTuple):
    """Two instructions whose accesses conflict."""

    kind: str
    first: int
    second: int
    detail: str


def find_races(accesses: list[Access], clocks: Clocks, memory: GlobalMemory) -> list[Race]:
    """Every pair of instructions with unordered conflicting accesses, once."""
    found: list[Race] = []
    by_span: dict[int, list[tuple[int, Access]]] = {}
    for number, access in enumerate(accesses):
        by_span.setdefault(access.span, []).append((number, access))
    table = None
    for numbered in by_span.values():
        if len({access.kind for _, access in numbered}) == 1 and numbered[0][1].kind != WRITE:
            continue
        lanes = _conflicting_lanes(numbered)
        if lanes.unit.size:
            table = clocks.table() if table is None else table
            found += _races_of(lanes, table, memory)
    return found


class _Lanes(NamedTuple):
    """Accesses of single lanes to single units of memory, ordered by unit and then by time of execution."""

    unit: np.ndarray
    thread: np.ndarray
    time: np.ndarray
    converged: np.ndarray
    kind: np.ndarray
    instruction: np.ndarray
    number: np.ndarray
    unit_bytes: int


def _conflicting_lanes(numbered: list[tuple[int, Access]]) -> _Lanes:
    """The accesses of units that several threads access, and at least one of them writes."""
    unit_bytes = min(access.num_bytes for _, access in numbered)
    columns: list[list[np.ndarray]] = [[] for _ in range(7)]
    for number, access in numbered:
        size = access.address.size
        same = (access.thread, access.time, access.converged)
        constants = [np.full(size, value) for value in (access.kind, access.instruction, number)]
        for part in range(0, access.num_bytes, unit_bytes):
            row = (access.address.astype(I8) + part, *same, *constants)
            for column, values in zip(columns, row, strict=True):
                column.append(values)
    unit, thread, time, converged, kind, instruction, order = (np.concatenate(column) for column in columns)
    unit //= unit_bytes
    by_unit = np.lexsort((order, unit))
    unit = unit[by_unit]
    starts = np.flatnonzero(np.r_[True, unit[1:] != unit[:-1]])
    writes = np.logical_or.reduceat(kind[by_unit] != READ, starts)
    threads = thread[by_unit]
    several = np.maximum.reduceat(threads, starts) != np.minimum.reduceat(threads, starts)
    keep = np.repeat(writes & several, np.diff(np.r_[starts, unit.size]))
    chosen = by_unit[keep]
    rest = (column[chosen] for column in (thread, time, converged, kind, instruction, order))
    return _Lanes(unit[keep], *rest, unit_bytes)


def _races_of(lanes: _Lanes, table: np.ndarray, memory: GlobalMemory) -> list[Race]:
    found: dict[tuple[str, int, int], Race] = {}
    warp = lanes.thread // WARP
    for distance in range(1, lanes.unit.size):
        earlier = np.flatnonzero(lanes.unit[distance:] == lanes.unit[:-distance])
        if not earlier.size:
            break
        later = earlier + distance
        kinds = lanes.kind[earlier], lanes.kind[later]
        conflict = (kinds[0] == WRITE) | (kinds[1] == WRITE) | (kinds[0] != kinds[1])
        conflict &= lanes.thread[earlier] != lanes.thread[later]
        earlier, later = earlier[conflict], later[conflict]
        of_two_warps = warp[earlier] != warp[later]
        is_ordered = np.where(
            of_two_warps,
            table[warp[later], lanes.time[later], warp[earlier]] >= lanes.time[earlier],
            lanes.converged[earlier] < lanes.converged[later],
        )
        of_one_access = lanes.number[earlier] == lanes.number[later]
        for kind, chosen in (
            (RACE, ~is_ordered & of_two_warps),
            (SAME_STORE, ~is_ordered & ~of_two_warps & of_one_access),
            (WITHIN_A_WARP, ~is_ordered & ~of_two_warps & ~of_one_access),
        ):
            if not chosen.any():
                continue
            pairs = np.stack([lanes.instruction[earlier[chosen]], lanes.instruction[later[chosen]]], axis=1)
            for pair, at, count in zip(*np.unique(pairs, axis=0, return_index=True, return_counts=True), strict=True):
                one, other = earlier[chosen][at], later[chosen][at]
                names = memory.names_at(int(lanes.unit[one]) * lanes.unit_bytes)
                threads = f"threads {lanes.thread[one]} and {lanes.thread[other]}"
                key = (kind, int(pair[0]), int(pair[1]))
                found.setdefault(key, Race(*key, f"{names}: {count} pairs, for example {threads}"))
    return list(found.values())
