"""What the checks of the emulator found, and what was executed."""

from collections import Counter
from typing import NamedTuple

RACE = "race in global memory"
SHARED_RACE = "race in shared memory"
OUT_OF_BOUNDS = "access out of bounds"
MISALIGNED = "misaligned access"
UNINITIALISED = "shared memory read before it is written"
DIVERGENT = "warp instruction in divergent code"
MISSED_BARRIER = "barrier that exited warps do not reach"
ORDER_DEPENDENT = "results depend on the order of warps and thread blocks"
SAME_STORE = "lanes of one store write one address"
# no error on today's GPUs: lanes of a warp run in program order; equal values may be stored by several warps
WITHIN_A_WARP = "accesses of one warp without a warp barrier"
EQUAL_STORES = "equal values stored by several warps"
HARMLESS = {WITHIN_A_WARP, EQUAL_STORES}


class Finding(NamedTuple):
    """One kind of error at one place."""

    kind: str
    kernel: str
    place: str  # lines of the Triton code


class Report:
    """The findings of all launches, and counts of what was executed."""

    def __init__(self) -> None:
        self.findings: Counter[Finding] = Counter()
        self.details: dict[Finding, str] = {}  # of the first occurrence
        self.executed: Counter[str] = Counter()  # instructions of a kind, barriers, ...
        self.launches: Counter[str] = Counter()  # by kernel

    def add(self, kind: str, kernel: str, place: str, detail: str) -> None:
        """Record a finding."""
        finding = Finding(kind, kernel, place)
        self.findings[finding] += 1
        self.details.setdefault(finding, detail)

    @property
    def errors(self) -> set[str]:
        """The kinds of findings that are errors."""
        return {finding.kind for finding in self.findings} - HARMLESS

    def lines(self) -> list[str]:
        """The errors, one per line."""
        return [
            f"{finding.kind} [{count}x] {finding.kernel}, {finding.place}: {self.details[finding]}"
            for finding, count in sorted(self.findings.items())
            if finding.kind not in HARMLESS
        ]
