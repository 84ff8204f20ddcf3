"""One launch of a kernel: its thread blocks, and the order in which they and their warps execute."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Self

import numpy as np

from tests.ptx.lanes import LaneGroup
from tests.ptx.memory import WARP, GlobalMemory, SharedMemory
from tests.ptx.program import EmulatorError, Program
from tests.ptx.races import Access, Clocks, find_races
from tests.ptx.report import EQUAL_STORES, MISSED_BARRIER, SHARED_RACE, Report
from tests.ptx.translator import Translator


@dataclass(frozen=True)
class Schedule:
    """An order of execution; CUDA allows any.

    "forward" and "reversed" apply to thread blocks and warps; "shuffled" shuffles the warps after each barrier;
    "random" also interleaves all thread blocks, one basic block of a warp at a time.
    """

    order: Literal["forward", "reversed", "shuffled", "random"] = "forward"
    in_lockstep: bool = False  # all warps of a thread block execute each instruction together, which is much faster
    seed: int = 0


LOCKSTEP = Schedule(in_lockstep=True)
REVERSED = Schedule("reversed")


class Code(NamedTuple):
    """A kernel translated for groups of so many lanes."""

    whole: list[Callable[..., Any]]
    masked: list[Callable[..., Any]]
    dtypes: list[type]  # of the registers


class TranslatedKernel:
    """A kernel; it is translated when it is first executed."""

    def __init__(self, ptx: str, num_warps: int, shared_bytes: int) -> None:
        self.program, self.num_warps, self.shared_bytes = Program(ptx), num_warps, shared_bytes
        self._code: dict[int, Code] = {}

    @classmethod
    def from_triton(cls, kernel: Any) -> Self:
        """A kernel that Triton compiled."""
        metadata = kernel.metadata
        if metadata.global_scratch_size or metadata.num_ctas != 1 or getattr(metadata, "tmem_size", 0):
            raise EmulatorError(f"{metadata.name} uses scratch memory or clusters, which are not implemented")
        return cls(kernel.asm["ptx"], metadata.num_warps, metadata.shared)

    def code(self, num_lanes: int) -> Code:
        """The kernel for groups of so many lanes."""
        if num_lanes not in self._code:
            translator = Translator(self.program, num_lanes)
            self._code[num_lanes] = Code(*translator.functions(), translator.dtypes)
        return self._code[num_lanes]


class Launch:
    """One launch, executed once, under one schedule."""

    def __init__(
        self,
        kernel: TranslatedKernel,
        arguments: Sequence[float],
        grid: int,
        memory: GlobalMemory,
        schedule: Schedule,
        report: Report,
    ) -> None:
        self.kernel, self.arguments, self.grid, self.memory = kernel, arguments, grid, memory
        self.schedule, self.report = schedule, report
        self.lanes_per_group = WARP * kernel.num_warps if schedule.in_lockstep else WARP
        self.code = kernel.code(self.lanes_per_group)
        self.clocks = Clocks(grid * kernel.num_warps)
        self.accesses: list[Access] = []
        self.executed: Counter[str] = Counter()

    def run(self) -> None:
        """Execute all thread blocks and report what the checks find."""
        rng, order = random.Random(self.schedule.seed), self.schedule.order
        running = [ThreadBlock(self, number) for number in range(self.grid)]
        if order == "reversed":
            running.reverse()
        with np.errstate(all="ignore"):
            while running:
                block = rng.choice(running) if order == "random" else running[0]
                block.advance(rng)
                if block.is_done:
                    running.remove(block)
        for race in find_races(self.accesses, self.clocks, self.memory):
            self.note(race.kind, race.second, race.detail, race.first)
        self.report.executed.update(self.executed)

    def note(self, kind: str, instruction: int, detail: str, earlier: int | None = None) -> None:
        """Report a finding at an instruction, with an earlier one that conflicts with it."""
        instructions = self.kernel.program.instructions
        at = instructions[instruction]
        place, detail = at.source, f"{detail}; PTX line {at.line}: {at.text}"
        if earlier is not None:
            other = instructions[earlier]
            place, detail = f"{other.source} and {place}", f"{detail} after line {other.line}: {other.text}"
        self.report.add(kind, self.kernel.program.name, place, detail)


class ThreadBlock:
    """One program of the grid: its warps and its shared memory."""

    def __init__(self, launch: Launch, number: int) -> None:
        num_warps = launch.kernel.num_warps
        self.launch, self.number = launch, number
        self.shared = SharedMemory(launch.kernel.shared_bytes, num_warps)
        self.warps = list(range(number * num_warps, (number + 1) * num_warps))
        self.groups = [LaneGroup(self, index) for index in range(WARP * num_warps // launch.lanes_per_group)]
        if launch.schedule.order == "reversed":
            self.groups.reverse()
        self._running, self._waiting = list(self.groups), list[LaneGroup]()

    @property
    def is_done(self) -> bool:
        """Whether all lanes have exited."""
        return not self._running

    def advance(self, rng: random.Random) -> None:
        """Let one group execute until its next barrier or its end; in random order, for one basic block."""
        is_random = self.launch.schedule.order == "random"
        group = rng.choice(self._running) if is_random else self._running[0]
        while True:
            event = next(group.steps, None)
            if event != "block":
                self._running.remove(group)
                if event == "barrier":
                    self._waiting.append(group)
                break
            if is_random:
                break
        if not self._running:
            self._check_shared_memory()
            if self._waiting:
                self._pass_barrier(rng)

    def note_missed_barrier(self) -> None:
        """Report that some warps wait at a barrier after others have exited."""
        self.launch.report.add(MISSED_BARRIER, self.launch.kernel.program.name, "?", f"in thread block {self.number}")

    def _check_shared_memory(self) -> None:
        """Report the races since the last barrier."""
        for are_equal, byte, count, first, second in self.shared.races():
            kind = EQUAL_STORES if are_equal else SHARED_RACE
            self.launch.note(kind, first, f"{count} bytes from byte {byte} on", second)
        self.shared.start_epoch()

    def _pass_barrier(self, rng: random.Random) -> None:
        if len(self._waiting) < len(self.groups):
            self.note_missed_barrier()
        self.launch.executed["barriers"] += 1
        self.launch.clocks.barrier(self.warps)
        self.launch.clocks.converged[self.warps] += 1
        for group in self.groups:
            group.refresh_clocks()
        is_shuffled = self.launch.schedule.order == "shuffled"
        order = rng.sample(self.groups, len(self.groups)) if is_shuffled else self.groups
        self._running, self._waiting = [group for group in order if group in self._waiting], []
