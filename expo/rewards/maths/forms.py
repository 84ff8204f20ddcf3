"""Which formulas are values, and which are operations that are still to be computed."""

from fractions import Fraction
from itertools import combinations

from expo.rewards.maths.formula import Node, variables
from expo.rewards.maths.surds import monomial
from expo.rewards.maths.values import rational, root


def is_unevaluated(gold: Node, stated: Node) -> bool:
    """Whether a stated answer is an operation where the gold answer is a value, or a sum of like terms."""
    if variables(gold):
        return has_like_terms(stated) and not has_like_terms(gold)
    return is_value(gold) and not is_value(stated)


def is_value(node: Node) -> bool:
    r"""Whether a constant is written as a value: nothing in it could still be computed by adding or multiplying.

    Values are numbers, mixed numbers, fractions, radicals, powers of literals, scientific notation, multiples and
    irreducible sums of these with pi, e, i, and one function of literals (`5!`, `\ln 2`). `12 \times 12`, `4 - 1` and
    `\gcd(4, 6)` are not.
    """
    op, args = node.op, node.args
    if op in ("num", "const", "mixed"):
        return True
    if op == "neg":
        return args[0].op != "neg" and is_value(args[0])
    if op == "frac":
        return is_value(args[0]) and (is_value(args[1]) or _is_mixed_sum(args[1]))
    if op == "div":
        quotient = rational(node)
        is_integer = quotient is not None and quotient.denominator == 1
        return node.name == "/" and not is_integer and all(is_value(arg) for arg in args)
    if op == "pow":
        return _is_power_value(args[0], args[1])
    if op == "root":
        return is_value(args[0]) and args[1].op == "num" and rational(node) is None
    if op == "mul":
        return _is_product_value(args)
    if op == "add":
        return all(is_value(arg) for arg in args) and not any(_combine(*pair) for pair in combinations(args, 2))
    return op == "call" and _is_call_value(node)


def _is_literal(node: Node) -> bool:
    if node.op in ("neg", "frac", "div"):
        return all(arg.op == "num" for arg in node.args)
    return node.op in ("num", "mixed")


def _is_mixed_sum(node: Node) -> bool:
    r"""The denominator of a continued fraction: `1+\frac{1}{2}`."""
    if node.op != "add" or len(node.args) != 2 or node.args[0].op != "num":
        return False
    fraction = node.args[1].args[0] if node.args[1].op == "neg" else node.args[1]
    return fraction.op == "frac" and is_value(fraction)


def _is_power_value(base: Node, exponent: Node) -> bool:
    if base.op == "const":
        return is_value(exponent)
    power = rational(exponent)
    if not (_is_literal(base) and _is_literal(exponent)) or power is None or power in (0, 1):
        return False
    return power.denominator == 1 or rational(Node("pow", (base, exponent))) is None


def _is_product_value(factors: tuple[Node, ...]) -> bool:
    if len(factors) == 2 and factors[1].op == "pow" and factors[1].args[0] == Node("num", name="10"):
        return _is_literal(factors[0]) and _is_power_value(*factors[1].args)
    if not all(is_value(factor) for factor in factors):
        return False
    rationals = [factor for factor in factors if rational(factor) is not None]
    sums = [factor for factor in factors if factor.op == "add"]
    roots = [factor for factor in factors if factor.op == "root"]
    constants = [factor.name for factor in factors if factor.op == "const"]
    return len(rationals) <= 1 and len(sums) <= 1 and len(roots) <= 1 and len(set(constants)) == len(constants)


def _combine(first: Node, second: Node) -> bool:
    """Whether the sum of two values is a shorter value: both rational, or multiples of the same irrational number."""
    one, other = monomial(first), monomial(second)
    if one is None or other is None:
        return first == second
    if not (one.sign and other.sign):
        return True
    if (one.pi, one.e, one.i) != (other.pi, other.e, other.i):
        return False
    return root(one.square * other.square, Fraction(2)) is not None


def _is_call_value(node: Node) -> bool:
    if node.name in ("factorial", "binomial", "abs", "floor", "ceiling"):
        return all(arg.op == "num" or (arg.op == "neg" and arg.args[0].op == "num") for arg in node.args)
    if node.name in ("gcd", "lcm", "max", "min"):
        return False
    return all(is_value(arg) for arg in node.args)


def has_like_terms(node: Node) -> bool:
    """Whether a sum has terms that differ by a factor only: `2x + 3x`."""
    if node.op == "add":
        keys = [_factors(term) for term in node.args]
        if len(set(keys)) < len(keys):
            return True
    return any(has_like_terms(arg) for arg in node.args)


def _factors(term: Node) -> tuple[Node, ...]:
    """The factors of a term that are no rational number, in a fixed order."""
    if term.op == "neg":
        return _factors(term.args[0])
    factors = term.args if term.op == "mul" else (term,)
    return tuple(sorted(factor for factor in factors if rational(factor) is None))
