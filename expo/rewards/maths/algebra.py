"""Computer algebra for the worker processes: compares formulas that rational arithmetic cannot decide.

Constants are compared exactly: a difference counts as zero only if it stays below every digit of a precision that grows
with the numbers in the formulas. Formulas with variables are compared at fixed points, as constants. Nothing here has a
time limit: the process that runs it is killed at its deadline.
"""

import functools
from fractions import Fraction
from typing import Any, Final

import sympy
from sympy.core.evalf import PrecisionExhausted

from expo.rewards.maths import surds
from expo.rewards.maths.formula import Node, variables

# Digits to which equal constants agree, beyond the digits of the numbers in them.
_DIGITS: Final = 100
# Rational coordinates of either sign, of a size at which powers stay small; each variable starts at another one.
_COORDINATES: Final = tuple(
    sympy.Rational(top, bottom)
    for top, bottom in ((7, 5), (-11, 7), (13, 9), (29, 12), (-8, 11), (17, 13), (-31, 17), (5, 14), (23, 19))
)
_NUM_POINTS: Final = 5
_CONSTANTS: Final = {"pi": sympy.pi, "e": sympy.E, "i": sympy.I, "infty": sympy.oo, "deg": sympy.pi / 180}
_FUNCTIONS: Final = {
    "arcsin": sympy.asin,
    "arccos": sympy.acos,
    "arctan": sympy.atan,
    "ln": sympy.log,
    "floor": sympy.floor,
    "ceiling": sympy.ceiling,
    "abs": sympy.Abs,
    "max": sympy.Max,
    "min": sympy.Min,
    **{
        name: getattr(sympy, name)
        for name in ("sin", "cos", "tan", "cot", "sec", "csc", "sinh", "cosh", "tanh", "exp", "factorial", "binomial")
    },
}


class BadGoldError(Exception):
    """The gold answer is no formula."""


class SympyAlgebra:
    """The `Algebra` of the workers."""

    def equal(self, gold: Node, stated: Node) -> bool:
        """Whether two formulas have the same value everywhere."""
        found = surds.equal(gold, stated)
        if found is not None:
            return found
        if _equal(expression(gold), expression(stated)):
            return True
        return not variables(gold) and not variables(stated) and _is_rounded(gold, stated)

    def ratio_sign(self, gold: Node, stated: Node) -> int:
        """The sign of the constant ratio of two formulas; 0 if it is not constant."""
        found = surds.ratio_sign(gold, stated)
        if found is not None:
            return found
        pairs = [pair for pair in _at_points(expression(gold), expression(stated)) if pair[1] != 0]
        ratios = [sympy.N(one / other, 30) for one, other in pairs]
        if len(ratios) < 2 or not all(ratio.is_real for ratio in ratios):
            return 0
        if any(abs(ratio - ratios[0]) > abs(ratios[0]) * sympy.Float("1e-20") for ratio in ratios):
            return 0
        return int(sympy.sign(ratios[0]))

    def same_text(self, gold: str, stated: str) -> bool:
        """Whether math-verify parses two texts as formulas of equal value. Raises: BadGoldError."""
        try:
            meant = parse_latex(gold)
        except MemoryError:
            raise
        except Exception as error:  # the grammar raises many unrelated types
            raise BadGoldError(gold) from error
        found = parse_latex(stated)
        if not isinstance(meant, sympy.Expr) or not isinstance(found, sympy.Expr):
            return bool(meant == found)
        return _equal(meant.doit(), found.doit())


@functools.lru_cache(maxsize=1024)
def parse_latex(text: str) -> Any:
    """The sympy object of a LaTeX formula. Raises: an exception of the grammar."""
    from math_verify.parser import LatexExtractionConfig, normalize_latex, parse_latex_cached

    return parse_latex_cached(normalize_latex(text, LatexExtractionConfig().normalization_config))


def expression(node: Node) -> Any:
    """The sympy expression of a formula."""
    if node.op == "num":
        return sympy.Rational(Fraction(node.name))
    if node.op == "sym":
        return sympy.Symbol(node.name)
    if node.op == "const":
        return _CONSTANTS[node.name]
    args = [expression(arg) for arg in node.args]
    if node.op in ("add", "mixed"):
        return sympy.Add(*args)
    if node.op == "neg":
        return -args[0]
    if node.op == "mul":
        return sympy.Mul(*args)
    if node.op in ("frac", "div"):
        return args[0] / args[1]
    if node.op == "pow":
        return args[0] ** args[1]
    if node.op == "root":
        return sympy.root(args[0], args[1]) if args[1] % 2 == 0 else sympy.real_root(args[0], args[1])
    return _call(node.name, args)


def _call(name: str, args: list[Any]) -> Any:
    if name == "lg":
        return sympy.log(args[0], 10)
    if name == "log":
        return sympy.log(*args)
    if name in ("gcd", "lcm"):
        return functools.reduce(sympy.gcd if name == "gcd" else sympy.lcm, args)
    return _FUNCTIONS[name](*args)


def _equal(gold: Any, stated: Any) -> bool:
    if not gold.free_symbols and not stated.free_symbols:
        return _equal_constants(gold, stated)
    pairs = _at_points(gold, stated)
    return len(pairs) >= 2 and all(_equal_constants(one, other) for one, other in pairs)


def _at_points(gold: Any, stated: Any) -> list[tuple[Any, Any]]:
    """The values of two expressions at the points where both are finite."""
    names = sorted(gold.free_symbols | stated.free_symbols, key=str)
    found = []
    for number in range(_NUM_POINTS):
        point = {name: _COORDINATES[(3 * number + index) % len(_COORDINATES)] for index, name in enumerate(names)}
        pair = gold.subs(point), stated.subs(point)
        if not any(side.has(sympy.nan, sympy.zoo, sympy.oo) for side in pair):
            found.append(pair)
    return found


def _equal_constants(gold: Any, stated: Any) -> bool:
    """Whether a difference of constants is zero; proven for a difference that is not."""
    if any(side.has(sympy.nan, sympy.zoo) for side in (gold, stated)):
        return False
    difference = gold - stated
    if difference.is_Rational:
        return bool(difference == 0)
    digits = _DIGITS + sum(len(str(abs(number.p))) + len(str(number.q)) for number in difference.atoms(sympy.Rational))
    try:
        return bool(sympy.N(difference, 2, maxn=digits, strict=True) == 0)
    except PrecisionExhausted:
        sides = [sympy.N(side, digits) for side in (gold, stated)]
        return bool(abs(sides[0] - sides[1]) <= max(abs(side) for side in sides) * sympy.Float(10) ** (10 - digits))


def _is_rounded(gold: Node, stated: Node) -> bool:
    """Whether one is a decimal of six places or more to which the other rounds or is truncated."""
    for decimal, exact in ((gold, stated), (stated, gold)):
        places = surds.decimal_places(decimal)
        if places >= surds.MIN_PLACES and surds.decimal_places(exact) < 0:
            distance = abs(sympy.N(expression(decimal) - expression(exact), 15))
            if distance.is_real and distance < sympy.Rational(1, 10**places):
                return True
    return False
