"""Arithmetic instructions of PTX, translated to Python: floating point, integers, moves, conversions, comparisons."""

import re

import numpy as np

from tests.ptx.operands import Operands, name_of, size_of
from tests.ptx.program import F2, F4, F8, I2, I4, I8, TYPES, U2, U4, U8, UNSIGNED

_SIGNS = {"add": "+", "sub": "-", "mul": "*", "and": "&", "or": "|", "xor": "^"}
_COMPARISONS = {
    **{"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">="},
    **{"lo": "<", "ls": "<=", "hi": ">", "hs": ">="},
}
_NUM_OPERANDS = {"fma": (3,), "min": (2, 3), "max": (2, 3)} | dict.fromkeys(("add", "sub", "mul", "div"), (2,))
_TWICE_AS_WIDE = {U2: U4, I2: I4, U4: U8, I4: I8}
_HALF = {U4: U2, U8: U4}


class UnknownInstructionError(ValueError):
    """An instruction, or a combination of modifiers, that is not implemented."""


class ArithmeticInstructions(Operands):
    """Each method returns the lines of code of `self.instruction`, whose name `parts` were joined by dots."""

    def arithmetic(self, parts: list[str]) -> list[str]:
        """Any instruction that only computes."""
        base, *modifiers, kind = parts
        args, dtype = self.instruction.args, TYPES.get(kind)
        special = {"mov": self._move, "cvt": self._convert, "setp": self._compare}.get(base)
        if special is not None:
            return special(parts)
        if base == "selp":
            condition, chosen, other = self.read(args[3], np.bool_), *(self.read(arg, dtype) for arg in args[1:3])
            return self.write(args[0], f"where({condition}, {chosen}, {other})", dtype)
        if base in ("and", "or", "xor", "not", "shl", "shr", "prmt", "bfe", "lop3"):
            return self._bits(base, kind)
        if kind in ("bf16", "f16", "bf16x2", "f16x2"):
            return self._half(base, modifiers, kind)
        if kind == "f32x2" and base in ("add", "sub", "mul", "fma") and modifiers == ["rn"]:
            # the lower halves are first in memory, so that a view has twice the lanes
            operands = [f"{self.read(arg, U8)}.view(float32)" for arg in args[1:]]
            return self.write(args[0], f"({self._add_or_multiply(base, operands, F4)}).view(uint64)", U8)
        if dtype in (F4, F8):
            return self._float(base, modifiers, dtype)
        if dtype is None or dtype is np.bool_:
            raise UnknownInstructionError
        return self._integer(base, modifiers, dtype)

    def _bits(self, base: str, kind: str) -> list[str]:
        args, dtype = self.instruction.args, TYPES[kind]
        if base == "bfe" and dtype is not U4:
            raise UnknownInstructionError
        if base == "lop3":
            operands = ", ".join(self.read(arg, U4) for arg in args[1:4])
            return self.write(args[0], f"logic_of_three({operands}, {int(args[4].rstrip('U'), 0)})", U4)
        if base in ("shl", "shr"):
            function = "shift_left" if base == "shl" else "shift_right"
            return self.write(args[0], f"{function}({self.read(args[1], dtype)}, {self.read(args[2], U4)})", dtype)
        operands = [self.read(arg, dtype) for arg in args[1:]]
        if base in ("prmt", "bfe"):
            function = "permute_bytes" if base == "prmt" else "extract_bits"
            return self.write(args[0], f"{function}({', '.join(operands)})", dtype)
        return self.write(args[0], f"~{operands[0]}" if base == "not" else f" {_SIGNS[base]} ".join(operands), dtype)

    # --- floating point

    def _half(self, base: str, modifiers: list[str], kind: str) -> list[str]:
        args = self.instruction.args
        if base in ("abs", "neg"):
            bits, signs = (U4, 0x80008000) if kind.endswith("x2") else (U2, 0x8000)
            everything = (1 << 8 * size_of(bits)) - 1
            operand = self.read(args[1], bits)
            if base == "neg":
                return self.write(args[0], f"{operand} ^ {self.constant(signs, bits)}", bits)
            return self.write(args[0], f"{operand} & {self.constant(everything ^ signs, bits)}", bits)
        if base in ("add", "sub", "fma") and modifiers == ["rn", "f32"]:
            # all operands but the last are half precision and are widened
            operands = [self._widened_half(arg, kind) for arg in args[1:-1]] + [self.read(args[-1], F4)]
            return self.write(args[0], self._add_or_multiply(base, operands, F4), F4)
        raise UnknownInstructionError

    def _widened_half(self, arg: str, kind: str) -> str:
        if kind == "bf16":
            return f"from_bfloat16({self.read(arg, U2)})"
        return f"{self.read(arg, F2)}.astype(float32)"

    def _narrowed_half(self, arg: str, kind: str) -> str:
        if kind == "bf16":
            return f"to_bfloat16({self.read(arg, F4)})"
        return f"{self.read(arg, F4)}.astype(float16).view(uint16)"

    def _add_or_multiply(self, base: str, operands: list[str], dtype: type) -> str:
        if base == "fma":
            return f"{'fma32' if dtype is F4 else 'fma64'}({', '.join(operands)})"
        return f" {_SIGNS[base]} ".join(operands)

    def _float(self, base: str, modifiers: list[str], dtype: type) -> list[str]:
        args = self.instruction.args
        flushes = "ftz" in modifiers and dtype is F4
        is_approximate = "approx" in modifiers or "full" in modifiers
        if set(modifiers) - {"rn", "ftz", "approx", "full", "NaN"}:
            raise UnknownInstructionError
        if "ftz" in modifiers and dtype is F8 and base != "rcp":
            raise UnknownInstructionError
        operands = [self.read(arg, dtype) for arg in args[1:]]
        if len(operands) not in _NUM_OPERANDS.get(base, (1,)):
            raise ValueError(f"{len(operands)} operands")
        if base in ("neg", "abs"):  # of the bits, so that NaN and zeros keep them
            bits = UNSIGNED[size_of(dtype)]
            sign = 1 << (8 * size_of(dtype) - 1)
            operand = self.read(args[1], bits)
            changed = f"^ {self.constant(sign, bits)}" if base == "neg" else f"& {self.constant(sign - 1, bits)}"
            operands = [f"({operand} {changed}).view({name_of(dtype)})"]
        if flushes:
            operands = [f"flush_subnormals({operand})" for operand in operands]
        out = self._float_result(base, modifiers, operands, dtype, is_approximate)
        return self.write(args[0], f"flush_subnormals({out})" if flushes else out, dtype)

    def _float_result(
        self, base: str, modifiers: list[str], operands: list[str], dtype: type, is_approximate: bool
    ) -> str:
        if base in ("neg", "abs"):
            return operands[0]
        if base in ("add", "sub", "mul", "fma") and not is_approximate:  # "rn" is the default
            return self._add_or_multiply(base, operands, dtype)
        if base in ("min", "max"):
            function, propagates_nan = f"{base}imum", "NaN" in modifiers
            out = f"{function}({operands[0]}, {operands[1]}, {propagates_nan})"
            return out if len(operands) == 2 else f"{function}({out}, {operands[2]}, {propagates_nan})"
        if base == "div" and "rn" in modifiers and not is_approximate:
            return f"{operands[0]} / {operands[1]}"
        if base == "sqrt" and "rn" in modifiers and not is_approximate:
            return f"np.sqrt({operands[0]})"
        if base == "rcp" and "rn" in modifiers and not is_approximate:
            return f"{self.constant(1.0, dtype)} / {operands[0]}"
        if base == "rcp" and dtype is F8 and modifiers == ["approx", "ftz"]:
            return f"reciprocal_approx_f64({operands[0]})"
        if dtype is not F4 or not is_approximate:
            raise UnknownInstructionError
        if base == "rcp":
            return f"approximate_div({self.constant(1.0, F4)}, {operands[0]})"
        if base == "div":
            out = f"approximate_div({operands[0]}, {operands[1]})"
            if "full" in modifiers:
                return out
            # div.approx gives 0 for divisors beyond 2^126
            return f"where(np.abs({operands[1]}) > float32(2.0**126), {operands[0]} * float32(0), {out})"
        if base in ("ex2", "sqrt"):
            return f"approximate_{base}({operands[0]})"
        raise UnknownInstructionError

    # --- integers

    def _integer(self, base: str, modifiers: list[str], dtype: type) -> list[str]:
        args = self.instruction.args
        if modifiers == ["wide"] and base in ("mul", "mad"):
            wide = _TWICE_AS_WIDE[dtype]
            out = " * ".join(f"{self.read(arg, dtype)}.astype({name_of(wide)})" for arg in args[1:3])
            return self.write(args[0], out if base == "mul" else f"{out} + {self.read(args[3], wide)}", wide)
        operands = [self.read(arg, dtype) for arg in args[1:]]
        two = ", ".join(operands[:2])
        results = {
            ("add", ""): " + ".join(operands),
            ("sub", ""): " - ".join(operands),
            ("mul", "lo"): " * ".join(operands),
            ("mul", "hi"): f"multiply_high({two})",
            ("mad", "lo"): f"{' * '.join(operands[:2])} + {operands[-1]}",
            ("div", ""): f"quotient({two})",
            ("rem", ""): f"remainder({two})",
            ("min", ""): f"np.minimum({two})",
            ("max", ""): f"np.maximum({two})",
            ("neg", ""): f"-{operands[0]}",
            ("abs", ""): f"np.abs({operands[0]})",
        }
        if (base, ".".join(modifiers)) not in results:
            raise UnknownInstructionError
        return self.write(args[0], results[base, ".".join(modifiers)], dtype)

    # --- moves, conversions, comparisons

    def _move(self, parts: list[str]) -> list[str]:
        to, source = self.instruction.args
        dtype = TYPES[parts[-1]]
        if found := re.fullmatch(r"%(tid|ctaid|nctaid|ntid)\.([xyz])", source):
            return self.write(to, f"g.special['{found[1]}.{found[2]}']", U4)
        if source.startswith("{"):  # two halves into one register
            low, high = (self.read(arg, _HALF[dtype]) for arg in source.strip("{} ").split(","))
            wide, bits = name_of(dtype), self.constant(4 * size_of(dtype), dtype)
            return self.write(to, f"{low}.astype({wide}) | ({high}.astype({wide}) << {bits})", dtype)
        if to.startswith("{"):
            low, high = to.strip("{} ").split(",")
            half, bits = _HALF[dtype], self.constant(4 * size_of(dtype), dtype)
            lines = [f"t = {self.read(source, dtype)}"]
            lines += self.write(low, f"t.astype({name_of(half)})", half)
            return lines + self.write(high, f"(t >> {bits}).astype({name_of(half)})", half)
        return self.write(to, self.read(source, dtype), dtype)

    def _convert(self, parts: list[str]) -> list[str]:
        args = self.instruction.args
        *modifiers, to, source = parts[1:]
        if modifiers == ["rpi", "ftz"] and to == source == "f32":
            return self.write(args[0], f"np.ceil(flush_subnormals({self.read(args[1], F4)}))", F4)
        if set(modifiers) - {"rn"}:
            raise UnknownInstructionError
        if to in ("bf16x2", "f16x2") and source == "f32":
            upper, lower = (self._narrowed_half(arg, to[:-2]) for arg in args[1:])
            return self.write(args[0], f"({upper}.astype(uint32) << uint32(16) | {lower}.astype(uint32))", U4)
        if to in ("bf16", "f16") and source == "f32":
            return self.write(args[0], self._narrowed_half(args[1], to), U2)
        if source in ("bf16", "f16") and to in ("f32", "f64"):
            return self.write(
                args[0], f"({self._widened_half(args[1], source)}).astype({name_of(TYPES[to])})", TYPES[to]
            )
        if "bf16" in (to, source) or "f16" in (to, source):
            raise UnknownInstructionError
        given, made = TYPES[source], TYPES[to]
        out = f"{self.read_low(args[1], given)}.astype({name_of(made)})"
        if made in (F4, F8) and ("rn" in modifiers or (made, given) == (F8, F4)):
            # numpy rounds once, to nearest, from float64 and from 64-bit integers too
            return self.write(args[0], out, made)
        if made not in (F4, F8) and given not in (F4, F8) and not modifiers:
            return self.write_extended(args[0], out, made)
        raise UnknownInstructionError

    def _compare(self, parts: list[str]) -> list[str]:
        args = self.instruction.args
        test, *modifiers, kind = parts[1:]
        if set(modifiers) - {"ftz"} or "|" in args[0]:
            raise UnknownInstructionError
        if kind in ("bf16", "f16"):
            a, b = (self._widened_half(arg, kind) for arg in args[1:3])
        else:
            a, b = (self.read(arg, TYPES[kind]) for arg in args[1:3])
        if modifiers:
            a, b = f"flush_subnormals({a})", f"flush_subnormals({b})"
        is_float = kind in ("f16", "bf16", "f32", "f64")
        has_nan = f"np.isnan({a}) | np.isnan({b})"
        if test in ("num", "nan"):
            out = has_nan if test == "nan" else f"~({has_nan})"
        elif is_float and test.endswith("u") and test[:-1] in _COMPARISONS:  # true if an operand is NaN
            out = f"({a} {_COMPARISONS[test[:-1]]} {b}) | {has_nan}"
        elif is_float and test == "ne":
            out = f"({a} != {b}) & ~({has_nan})"
        else:
            out = f"{a} {_COMPARISONS[test]} {b}"
        return self.write(args[0], out, np.bool_)
