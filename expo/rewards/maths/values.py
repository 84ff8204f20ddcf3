"""Rational values of formulas, exact and of bounded size.

Everything here is cheap and needs no algebra, so it runs in the trainer's process.
"""

import functools
import math
from fractions import Fraction
from typing import Final

from expo.rewards.maths.formula import Node

MAX_BITS: Final = 20_000  # of a numerator or denominator; larger numbers are left to the workers
_CACHE_SIZE: Final = 32_768
Point = dict[str, Fraction]


def fits(value: Fraction) -> bool:
    """Whether a number is small enough to go on with."""
    return max(value.numerator.bit_length(), value.denominator.bit_length()) <= MAX_BITS


@functools.lru_cache(maxsize=_CACHE_SIZE)
def rational(node: Node) -> Fraction | None:
    """The value of a constant formula; None if it is not rational, undefined, or too large."""
    return evaluate(node, {})


def evaluate(node: Node, point: Point) -> Fraction | None:
    """The value of a formula at a point; None as for `rational`, or if a variable has no coordinate."""
    if node.op == "num":
        return Fraction(node.name) if len(node.name) < 2_500 else None
    if node.op == "sym":
        return point.get(node.name)
    if node.op == "const":
        return None
    args = [evaluate(arg, point) for arg in node.args]
    known = [arg for arg in args if arg is not None]
    if len(known) < len(args):
        return None
    value = _apply(node, known)
    if value is None or not fits(value):
        return None
    return value


def _apply(node: Node, args: list[Fraction]) -> Fraction | None:
    if node.op in ("add", "mixed"):
        return sum(args, Fraction(0))
    if node.op == "neg":
        return -args[0]
    if node.op == "mul":
        product = Fraction(1)
        for arg in args:
            product *= arg
            if not fits(product):
                return None
        return product
    if node.op in ("frac", "div"):
        return args[0] / args[1] if args[1] else None
    if node.op == "pow":
        return power(args[0], args[1])
    if node.op == "root":
        return root(args[0], args[1])
    return _call(node.name, args)


def power(base: Fraction, exponent: Fraction) -> Fraction | None:
    """A rational power; None if it is irrational, undefined or too large."""
    if exponent.denominator == 2:
        half = root(base, Fraction(2))
        return None if half is None else power(half, exponent * 2)
    if exponent.denominator != 1 or (base == 0 and exponent <= 0):
        return None
    bits = max(base.numerator.bit_length(), base.denominator.bit_length())
    return base ** int(exponent) if abs(exponent) * bits <= MAX_BITS else None


def root(radicand: Fraction, index: Fraction) -> Fraction | None:
    """The square or cube root if it is rational."""
    if index == 2 and radicand >= 0:
        roots = (math.isqrt(radicand.numerator), math.isqrt(radicand.denominator))
    elif index == 3 and max(radicand.numerator.bit_length(), radicand.denominator.bit_length()) < 50:
        roots = (round(math.cbrt(radicand.numerator)), round(math.cbrt(radicand.denominator)))
    else:
        return None
    if roots[1] and Fraction(*roots) ** int(index) == radicand:
        return Fraction(*roots)
    return None


def _call(name: str, args: list[Fraction]) -> Fraction | None:
    if name == "abs":
        return abs(args[0])
    if name == "floor":
        return Fraction(math.floor(args[0]))
    if name == "ceiling":
        return Fraction(math.ceil(args[0]))
    if name in ("max", "min"):
        return max(args) if name == "max" else min(args)
    if any(arg.denominator != 1 or not 0 <= arg <= 1_500 for arg in args):
        return None
    whole = [int(arg) for arg in args]
    if name == "factorial":
        return Fraction(math.factorial(whole[0]))
    if name == "binomial":
        return Fraction(math.comb(whole[0], whole[1]))
    if name == "gcd":
        return Fraction(math.gcd(*whole))
    return Fraction(math.lcm(*whole)) if name == "lcm" and len(whole) < 9 else None
