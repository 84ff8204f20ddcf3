"""Translate a kernel's basic blocks into Python functions: control flow, memory, and instructions of a whole warp.

Each block becomes two functions: `b3(R, g)` for when all lanes of the group `g` execute block 3, and `b3m(R, g, m)` for
those of the mask `m`. They return the number of the next block, or a condition and two numbers.
"""

from collections.abc import Callable

import numpy as np

from tests.ptx import arithmetic
from tests.ptx.instructions import ArithmeticInstructions, UnknownInstructionError
from tests.ptx.operands import name_of, size_of
from tests.ptx.program import AT_BARRIER, EXIT, TYPES, U4, U8, UNSIGNED, EmulatorError, Instruction

# cache hints and the default scope change neither results nor order
_MEMORY_MODIFIERS = {
    *("global", "shared", "shared::cta", "gpu", "acq_rel", "relaxed", "add", "volatile", "v2", "v4", "v8"),
    *("cg", "ca", "L1::evict_last", "L1::evict_first", "L1::no_allocate", "L2::evict_first", "L2::evict_last"),
}


class Translator(ArithmeticInstructions):
    """The Python functions of a kernel, for groups of so many lanes."""

    def functions(self) -> tuple[list[Callable], list[Callable]]:
        """The functions of each block: for all lanes, and under a mask."""
        lines: list[str] = []
        for number, block in enumerate(self.program.blocks):
            for masked in (False, True):
                lines.append(f"def b{number}{'m' if masked else ''}(R, g{', m' if masked else ''}):")
                for instruction in block:
                    lines += [f"    {line}" for line in self._translate(instruction, number, masked)]
                if not lines[-1].lstrip().startswith("return"):
                    lines.append(f"    return {self.program.block_after(number)}")
        dtypes = {name_of(dtype): dtype for dtype in TYPES.values()}
        scope = {**vars(arithmetic), **dtypes, **self.constants, "np": np, "where": np.where}
        exec(compile("\n".join(lines), f"<{self.program.name}>", "exec"), scope)
        numbers = range(len(self.program.blocks))
        return [scope[f"b{number}"] for number in numbers], [scope[f"b{number}m"] for number in numbers]

    def _translate(self, instruction: Instruction, number: int, masked: bool) -> list[str]:
        self.instruction = instruction
        condition = None
        if instruction.predicate is not None:
            condition = f"{'~' if instruction.is_negated else ''}{self.read(f'%{instruction.predicate}', np.bool_)}"
        base = instruction.op.split(".")[0]
        if base in ("bra", "ret", "exit"):
            target = self.program.labels[instruction.args[0]] if base == "bra" else EXIT
            if condition is None:
                return [f"return {target}"]
            return [f"return {condition}, {target}, {self.program.block_after(number)}"]
        self.mask = (f"(m & {condition})" if condition else "m") if masked else condition
        try:
            return self._instruction(number)
        except UnknownInstructionError as error:
            raise EmulatorError(f"PTX line {instruction.line} is not implemented: {instruction.text}") from error
        except (KeyError, ValueError, IndexError) as error:
            raise EmulatorError(f"PTX line {instruction.line}, {instruction.text}: {error!r}") from error

    def _instruction(self, number: int) -> list[str]:
        op, args = self.instruction.op, self.instruction.args
        parts = op.split(".")
        if op == "bar.sync" and args == ["0"] and self.instruction.predicate is None:
            return [f"return {AT_BARRIER + number + 1}"]
        if op == "bar.warp.sync":
            return [f"g.converge({self._site()})"]
        if parts[:2] == ["ld", "param"]:
            return self._parameter(TYPES[parts[-1]])
        if parts[0] in ("ld", "st", "atom"):
            return self._memory(parts)
        if parts[:4] == ["ldmatrix", "sync", "aligned", "m8n8"]:
            return self._matrices(parts[4:])
        if parts[:2] == ["shfl", "sync"] and "|" not in args[0]:
            operands = ", ".join(self.read(arg, U4) for arg in args[1:])
            return [f"t = g.shuffle('{parts[2]}', {operands}, {self._site()})", *self.write(args[0], "t", U4)]
        if parts[:2] == ["redux", "sync"]:
            return self._reduce_warp(parts)
        return self.arithmetic(parts)

    def _site(self) -> str:
        """The last two arguments of every call of the lanes' methods: the mask, and which instruction it is."""
        return f"{self.mask}, {self.instruction.index}"

    def _reduce_warp(self, parts: list[str]) -> list[str]:
        args, dtype = self.instruction.args, TYPES[parts[-1]]
        operation = ".".join(parts[2:-1])
        operands = f"{self.read(args[1], dtype)}, {self.read(args[2], U4)}"
        return [f"t = g.reduce_warp('{operation}', {operands}, {self._site()})", *self.write(args[0], "t", dtype)]

    def _parameter(self, dtype: type) -> list[str]:
        register, name = self.instruction.args[0].strip("{} "), self.instruction.args[1].strip("[] ")
        index = [param for param, _ in self.program.params].index(name)
        if size_of(self.program.params[index][1]) != size_of(dtype):
            raise ValueError("a part of a parameter is read")
        return self.write_extended(register, f"g.parameter({index}, {name_of(dtype)})", dtype)

    def _matrices(self, modifiers: list[str]) -> list[str]:
        count, *rest = modifiers
        is_transposed = rest[0] == "trans"
        if rest[is_transposed:] not in (["shared", "b16"], ["shared::cta", "b16"]):
            raise UnknownInstructionError
        registers, address = self.instruction.args
        operands = f"{self.address(address, U4)}, {int(count.removeprefix('x'))}, {is_transposed}"
        lines = [f"t = g.load_matrices({operands}, {self._site()})"]
        for index, register in enumerate(registers.strip("{} ").split(",")):
            lines += self.write(register.strip(), f"t[{index}]", U4)
        return lines

    def _memory(self, parts: list[str]) -> list[str]:
        what, *modifiers, kind = parts
        args, dtype = self.instruction.args, TYPES[kind]
        space = "shared" if modifiers[0].startswith("shared") else "global"
        pointer = U8 if space == "global" else U4
        if set(modifiers) - _MEMORY_MODIFIERS:
            raise UnknownInstructionError
        if what == "atom":
            if space != "global" or "add" not in modifiers or kind not in ("u32", "s32"):
                raise UnknownInstructionError
            operands = f"{self.address(args[1], pointer)}, {self.read(args[2], U4)}, {'acq_rel' in modifiers}"
            return [f"t = g.atomic_add({operands}, {self._site()})", *self.write(args[0], "t", U4)]
        count = next((int(modifier[1]) for modifier in modifiers if modifier in ("v2", "v4", "v8")), 1)
        size = size_of(dtype)
        if what == "st":
            values = [self.read_low(arg.strip(), UNSIGNED[size]) for arg in args[1].strip("{} ").split(",")]
            address = self.address(args[0], pointer)
            return [f"g.store('{space}', {address}, {size}, ({', '.join(values)},), {self._site()})"]
        lines = [f"t = g.load('{space}', {self.address(args[1], pointer)}, {size}, {count}, {self._site()})"]
        for index, register in enumerate(args[0].strip("{} ").split(",")):
            lines += self.write_extended(register, f"t[{index}].view({name_of(dtype)})", dtype)
        return lines
