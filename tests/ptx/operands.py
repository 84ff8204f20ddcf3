"""Registers, constants and operands of a kernel as Python expressions over numpy arrays, one entry per lane."""

import re

import numpy as np

from tests.ptx.program import F4, F8, SIGNED, U4, U8, UNSIGNED, Instruction, Program


def size_of(dtype: type) -> int:
    """Bytes."""
    return int(np.dtype(dtype).itemsize)


def name_of(dtype: type) -> str:
    """The dtype's name in translated code."""
    return np.dtype(dtype).name


class Operands:
    """Reads and writes of operands in translated code, where `R[n]` is the n-th register."""

    def __init__(self, program: Program, num_lanes: int) -> None:
        self.program, self.num_lanes = program, num_lanes
        self.constants: dict[str, np.ndarray] = {}  # by name in translated code
        self.numbers: dict[str, int] = {}  # register -> n
        self.dtypes: list[type] = []  # of each register: unsigned integers, or bool
        for prefix, (dtype, count) in program.registers.items():
            for index in range(count):
                self.numbers[f"%{prefix}{index}"] = len(self.dtypes)
                self.dtypes.append(dtype if dtype is np.bool_ else UNSIGNED[size_of(dtype)])
        self.instruction: Instruction  # that is being translated
        self.mask: str | None = None  # expression of the lanes that execute it; None: all lanes

    def constant(self, value, dtype: type) -> str:
        """An array of equal numbers."""
        array = np.full(self.num_lanes, value, dtype=dtype)
        name = f"constant_{name_of(dtype)}_{array[:1].tobytes().hex()}"
        self.constants[name] = array
        return name

    def read(self, text: str, dtype: type) -> str:
        """An operand; the bits of a register of this size are reinterpreted as `dtype`."""
        text = text.strip()
        if text not in self.numbers:
            return self._immediate(text, dtype)
        number = self.numbers[text]
        held = self.dtypes[number]
        if held is dtype:
            return f"R[{number}]"
        if np.bool_ in (dtype, held) or size_of(held) != size_of(dtype):
            raise ValueError(f"{text} holds {name_of(held)}, but is read as {name_of(dtype)}")
        return f"R[{number}].view({name_of(dtype)})"

    def read_low(self, text: str, dtype: type) -> str:
        """An operand whose register may be wider than the bits that are read."""
        held = self.dtypes[self.numbers[text]] if text in self.numbers else dtype
        if size_of(held) > size_of(dtype) and np.dtype(dtype).kind in "iu":
            return f"{self.read(text, held)}.astype({name_of(dtype)})"
        return self.read(text, dtype)

    def _immediate(self, text: str, dtype: type) -> str:
        if text == "global_smem":  # the start of the shared memory
            return self.constant(0, dtype)
        if found := re.fullmatch(r"0f([0-9A-Fa-f]{8})", text):
            bits = int(found[1], 16)
            return self.constant(np.array(bits, U4).view(F4) if dtype is F4 else bits, dtype)
        if found := re.fullmatch(r"0d([0-9A-Fa-f]{16})", text):
            bits = int(found[1], 16)
            return self.constant(np.array(bits, U8).view(F8) if dtype is F8 else bits, dtype)
        found = re.fullmatch(r"(-?)(0x[0-9a-fA-F]+|\d+)U?", text)
        if not found:
            raise ValueError(f"{text} is not an operand")
        value = int(found[2], 0) * (-1 if found[1] else 1)
        if dtype is np.bool_:
            return self.constant(value != 0, dtype)
        value &= (1 << 8 * size_of(dtype)) - 1
        return self.constant(np.array(value, UNSIGNED[size_of(dtype)]).view(dtype), dtype)

    def write(self, text: str, expression: str, dtype: type) -> list[str]:
        """Assign an expression of this dtype to a register of its size."""
        text = text.strip()
        if text == "_":
            return []
        number = self.numbers[text]
        held = self.dtypes[number]
        if dtype is not held:
            if np.bool_ in (dtype, held) or size_of(held) != size_of(dtype):
                raise ValueError(f"{text} holds {name_of(held)}, but {name_of(dtype)} is written")
            expression = f"({expression}).view({name_of(held)})"
        if self.mask:
            return [f"R[{number}] = where({self.mask}, {expression}, R[{number}])"]
        return [f"R[{number}] = {expression}"]

    def write_extended(self, text: str, expression: str, dtype: type) -> list[str]:
        """The same, where the register may be wider: zeros, or the sign, fill it."""
        held = self.dtypes[self.numbers[text.strip()]]
        if size_of(held) == size_of(dtype):
            return self.write(text, expression, dtype)
        extended = SIGNED[size_of(held)] if np.dtype(dtype).kind == "i" else held
        return self.write(text, f"({expression}).astype({name_of(extended)})", extended)

    def address(self, text: str, dtype: type) -> str:
        """The expression of `[register + offset]`."""
        found = re.fullmatch(r"\[\s*(%?\w+)\s*(?:\+\s*(-?\d+))?\s*\]", text)
        if not found:
            raise ValueError(f"{text} is not an address")
        base, offset = self.read(found[1], dtype), int(found[2] or 0)
        if offset == 0:
            return base
        return f"{base} + {self.constant(offset % 2 ** (8 * size_of(dtype)), dtype)}"
