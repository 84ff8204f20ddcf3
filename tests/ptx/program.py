"""Parse the PTX of one kernel: registers, parameters, and basic blocks of instructions."""

import re
from typing import NamedTuple

import numpy as np

I1, I2, I4, I8 = np.int8, np.int16, np.int32, np.int64
U1, U2, U4, U8 = np.uint8, np.uint16, np.uint32, np.uint64
F2, F4, F8 = np.float16, np.float32, np.float64
UNSIGNED = {1: U1, 2: U2, 4: U4, 8: U8}  # by size in bytes; registers are stored like this, predicates as bool
SIGNED = {1: I1, 2: I2, 4: I4, 8: I8}
# numpy's type of each PTX type; bfloat16, which numpy lacks, is held as its bits
TYPES = {
    **{f"b{8 * size}": dtype for size, dtype in UNSIGNED.items()},
    **{f"u{8 * size}": dtype for size, dtype in UNSIGNED.items()},
    **{f"s{8 * size}": dtype for size, dtype in SIGNED.items()},
    **{"f16": F2, "bf16": U2, "f32": F4, "f64": F8, "pred": np.bool_},
}
# a block number from here on means: the lane waits at a barrier and goes on at that number - AT_BARRIER
AT_BARRIER = 1 << 20
EXIT = 1 << 30  # the block number of a lane that has returned

_IGNORED = r"\.(loc|version|target|address_size|file|section|reqntid|maxntid|minnctapersm|pragma|maxnreg)\b"
_UNSUPPORTED = r"\.reg\b|\.local\b|\.shared\b|\.callprototype|call"
_ENDS_A_BLOCK = r"bra|ret|exit|bar\.sync|barrier|atom|red\."


class EmulatorError(Exception):
    """The PTX contains what the emulator does not implement, or what is undefined on a GPU."""


class Instruction(NamedTuple):
    """One instruction, such as `@!%p1 add.s32 %r1, %r2, 3`."""

    index: int  # among the kernel's instructions
    line: int  # of the PTX
    source: str  # file and line of the Triton code
    predicate: str | None
    is_negated: bool
    op: str
    args: list[str]
    text: str


class Program:
    """One kernel."""

    def __init__(self, ptx: str) -> None:
        self.name = ""
        self.params: list[tuple[str, type]] = []
        self.registers: dict[str, tuple[type, int]] = {}  # prefix -> type and number
        self.instructions: list[Instruction] = []
        labels: dict[str, int] = {}
        source, in_assembly = "?", False
        for line_number, raw in enumerate(ptx.splitlines(), 1):
            # inline assembly has no source lines of its own
            in_assembly = "begin inline asm" in raw or (in_assembly and "end inline asm" not in raw)
            location = re.match(r"\s*\.loc\s.*//\s*(\S+?:\d+)(?::\d+)?\s*$", raw)
            if location and not in_assembly:
                source = location[1]
            line = raw.split("//")[0].strip()
            if line == "}":
                break
            if line and not re.match(_IGNORED, line):
                self._parse(line, line_number, source, labels)
        self._split_into_blocks(labels)

    def _parse(self, line: str, line_number: int, source: str, labels: dict[str, int]) -> None:
        if found := re.match(r"(?:\.visible )?\.entry (\w+)", line):
            if self.name:
                raise EmulatorError(f"PTX line {line_number} starts a second kernel; expected one")
            self.name = found[1]
        elif not self.name:
            if re.match(r"(\.visible |\.weak )?\.func", line):
                raise EmulatorError(f"PTX line {line_number} defines a function, which is not implemented: {line}")
        elif found := re.match(r"\.param (.*?)(\w+),?$", line):
            kind = re.search(r"\.([usbf]\d+)\b", found[1])
            assert kind, line
            self.params.append((found[2], TYPES[kind[1]]))
        elif found := re.match(r"\.reg \.(\w+)\s+%(\w+?)<(\d+)>;", line):
            self.registers[found[2]] = (TYPES[found[1]], int(found[3]))
        elif re.match(_UNSUPPORTED, line):
            raise EmulatorError(f"PTX line {line_number} is not implemented: {line}")
        elif found := re.match(r"([$\w]+):$", line):
            labels[found[1]] = len(self.instructions)
        elif line not in ("(", ")", "{"):
            for statement in self._statements(line, line_number):
                self._add(statement, line, line_number, source)

    def _statements(self, line: str, line_number: int) -> list[str]:
        """The statements of a line; registers declared in braces, as by libdevice, get names of their own."""
        scope = re.fullmatch(r"\{\s*\.reg \.(\w+) (\w+); (.*;)\s*\}", line)
        if not scope:
            return [line]
        name = f"scoped{line_number}x"
        self.registers[name] = (TYPES[scope[1]], 1)
        body = re.sub(rf"\b{scope[2]}\b", f"%{name}0", scope[3])
        return [f"{part.strip()};" for part in body.split(";")[:-1]]

    def _add(self, statement: str, line: str, line_number: int, source: str) -> None:
        found = re.fullmatch(r"(?:@(!?)%(p\d+)\s+)?([a-z][\w.:]*)\s*(.*?)\s*;", statement)
        if not found:
            raise EmulatorError(f"PTX line {line_number} is not an instruction: {line}")
        # commas in brackets do not separate operands
        args = [arg.strip() for arg in re.split(r",(?![^{\[]*[}\]])", found[4])] if found[4] else []
        index = len(self.instructions)
        self.instructions.append(
            Instruction(index, line_number, source, found[2], found[1] == "!", found[3], args, line)
        )

    def _split_into_blocks(self, labels: dict[str, int]) -> None:
        """Blocks end at branches and barriers, and before and after atomics."""
        starts = {0, *labels.values()}
        for index, instruction in enumerate(self.instructions):
            if re.match(_ENDS_A_BLOCK, instruction.op):
                starts.add(index + 1)
            if instruction.op.startswith(("atom", "red.")):
                starts.add(index)
        ordered = sorted(start for start in starts if start < len(self.instructions))
        number_of = {start: number for number, start in enumerate(ordered)}
        ends = [*ordered[1:], len(self.instructions)]
        self.blocks = [self.instructions[start:end] for start, end in zip(ordered, ends, strict=True)]
        self.labels = {name: number_of.get(index, EXIT) for name, index in labels.items()}

    def block_after(self, number: int) -> int:
        """The block that follows in the code."""
        return number + 1 if number + 1 < len(self.blocks) else EXIT
