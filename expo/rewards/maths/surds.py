"""Equality of formulas without algebra: sums of square roots, pi and e exactly, rational functions at fixed points.

A comparison that it cannot decide is None and goes to the worker processes.
"""

import functools
import zlib
from fractions import Fraction
from typing import Final, NamedTuple

from expo.rewards.maths.formula import Node, variables
from expo.rewards.maths.values import evaluate, fits, power, rational, root

_MAX_TERMS: Final = 64  # of a sum of square roots
_NUM_POINTS: Final = 4
_CACHE_SIZE: Final = 32_768
# A decimal of at least six places that is the rounded or truncated value counts as that value: 0.333333 is 1/3.
MIN_PLACES: Final = 6


class Monomial(NamedTuple):
    """sign * sqrt(square) * pi^pi * e^e * i^i, with i 0 or 1."""

    sign: int
    square: Fraction
    pi: Fraction = Fraction(0)
    e: Fraction = Fraction(0)
    i: int = 0


@functools.lru_cache(maxsize=_CACHE_SIZE)
def monomial(node: Node) -> Monomial | None:
    """The value of a constant as a monomial in square roots, pi, e and i; None if it has no such form."""
    value = rational(node)
    if value is not None:
        return Monomial((value > 0) - (value < 0), value * value)
    if node.op == "const":
        return {
            "pi": Monomial(1, Fraction(1), pi=Fraction(1)),
            "e": Monomial(1, Fraction(1), e=Fraction(1)),
            "i": Monomial(1, Fraction(1), i=1),
            "deg": Monomial(1, Fraction(1, 32_400), pi=Fraction(1)),
        }.get(node.name)
    if node.op == "neg":
        inner = monomial(node.args[0])
        return inner and inner._replace(sign=-inner.sign)
    if node.op in ("mul", "frac", "div"):
        parts = [monomial(arg) for arg in node.args]
        product: Monomial | None = parts[0]
        for part in parts[1:]:
            if product is None or part is None:
                return None
            product = _times(product, part if node.op == "mul" else _inverse(part))
        return product
    if node.op == "root" and rational(node.args[1]) == 2:
        radicand = rational(node.args[0])
        if radicand is None:
            return None
        return Monomial(1, radicand) if radicand > 0 else Monomial(1, -radicand, i=1)
    if node.op == "pow":
        return _monomial_power(node)
    return None


def _times(first: Monomial, second: Monomial | None) -> Monomial | None:
    if second is None:
        return None
    square = first.square * second.square
    if not fits(square):
        return None
    sign = first.sign * second.sign * (-1 if first.i and second.i else 1)
    return Monomial(sign, square, first.pi + second.pi, first.e + second.e, first.i ^ second.i)


def _inverse(value: Monomial) -> Monomial | None:
    if not value.sign:
        return None
    return Monomial(-value.sign if value.i else value.sign, 1 / value.square, -value.pi, -value.e, value.i)


def _monomial_power(node: Node) -> Monomial | None:
    base, exponent = monomial(node.args[0]), rational(node.args[1])
    if base is None or exponent is None or not base.sign:
        return None
    if base == Monomial(1, Fraction(1), e=Fraction(1)):
        return base._replace(e=exponent)
    if exponent.denominator == 2 and base.sign > 0 and not (base.pi or base.e or base.i):
        value = power(base.square, exponent)  # sqrt(square)^exponent squared
        return None if value is None else Monomial(1, value)
    if exponent.denominator != 1 or abs(exponent) > 1_000:
        return None
    times = int(exponent)
    square = power(base.square, exponent)
    if square is None:
        return None
    sign = base.sign ** abs(times) * (-1 if base.i and times % 4 in (2, 3) else 1)
    return Monomial(sign, square, base.pi * times, base.e * times, base.i * times % 2)


def equal(first: Node, second: Node) -> bool | None:
    """Whether two formulas have the same value everywhere; None if that needs algebra."""
    if first == second:
        return True
    names = variables(first) | variables(second)
    if not names:
        if _has_infinity(first) or _has_infinity(second):
            return False
        sums = monomials(first), monomials(second)
        if sums[0] is None or sums[1] is None:
            return None
        if _is_zero([*sums[0], *(term._replace(sign=-term.sign) for term in sums[1])]) or _is_rounded(first, second):
            return True
        # whether a long decimal rounds an irrational number is for the workers
        is_open = max(decimal_places(first), decimal_places(second)) >= MIN_PLACES
        return None if is_open and None in (rational(first), rational(second)) else False
    outcomes = [_equal_at(first, second, names, number) for number in range(_NUM_POINTS)]
    if False in outcomes:
        return False
    # undefined points count for nothing; two agreeing points of 20-digit coordinates decide for rational functions
    return True if outcomes.count(True) >= 2 else None


def _has_infinity(node: Node) -> bool:
    return node.name == "infty" or any(_has_infinity(arg) for arg in node.args)


@functools.lru_cache(maxsize=_CACHE_SIZE)
def monomials(node: Node) -> tuple[Monomial, ...] | None:
    """A constant as a sum of monomials; None if it has no such form, or too many terms."""
    single = monomial(node)
    if single is not None:
        return (single,) if single.sign else ()
    parts = [monomials(arg) for arg in node.args]
    known = [part for part in parts if part is not None]
    if len(known) < len(parts) or not known:
        return None
    if node.op == "add":
        return tuple(term for part in known for term in part)
    if node.op == "neg":
        return tuple(term._replace(sign=-term.sign) for term in known[0])
    if node.op == "mul":
        return _product(known)
    if node.op in ("frac", "div") and len(known[1]) == 1:
        inverse = _inverse(known[1][0])
        return inverse and _product([known[0], (inverse,)])
    if node.op == "pow":
        exponent = rational(node.args[1])
        return _product([known[0]] * int(exponent)) if exponent in (2, 3, 4) else None
    return None


def _product(sums: list[tuple[Monomial, ...]]) -> tuple[Monomial, ...] | None:
    product: tuple[Monomial, ...] = (Monomial(1, Fraction(1)),)
    for terms in sums:
        if len(product) * len(terms) > _MAX_TERMS:
            return None
        found = [_times(one, other) for one in product for other in terms]
        product = tuple(term for term in found if term is not None)
        if len(product) < len(found):
            return None
    return product


def _is_zero(terms: list[Monomial]) -> bool:
    """Whether a sum of monomials vanishes: square roots of different square-free numbers are independent."""
    rest = list(terms)
    while rest:
        head = rest.pop()
        total, others = Fraction(head.sign), []
        for term in rest:
            # term = sign * q * |head| with a rational q, if the roots are of the same square-free number
            is_like = (term.pi, term.e, term.i) == (head.pi, head.e, head.i)
            factor = root(term.square / head.square, Fraction(2)) if is_like and head.sign else None
            if factor is None:
                others.append(term)
            else:
                total += term.sign * factor
        if total:
            return False
        rest = others
    return True


def _equal_at(first: Node, second: Node, names: frozenset[str], number: int) -> bool | None:
    point = {name: _coordinate(name, number) for name in names}
    values = evaluate(first, point), evaluate(second, point)
    return None if None in values else values[0] == values[1]


def _coordinate(name: str, number: int) -> Fraction:
    """A value for a variable: the same for the same name, of either sign, with a large denominator."""
    seed = zlib.crc32(f"{name}:{number}".encode("utf-8", "surrogatepass"))
    return Fraction((seed % 2_000_003) * (-1 if number % 2 else 1) + 7, 1_009 + seed % 997)


def _is_rounded(first: Node, second: Node) -> bool:
    """Whether one is a decimal of six places or more and the other, exact, rounds or truncates to it."""
    for decimal, exact in ((first, second), (second, first)):
        places = decimal_places(decimal)
        if places >= MIN_PLACES and decimal_places(exact) < 0:
            value, given = rational(exact), rational(decimal)
            if value is not None and given is not None and abs(value - given) < Fraction(1, 10**places):
                return True
    return False


def decimal_places(node: Node) -> int:
    """The digits after the point of a plain decimal, which has six significant ones or more; -1 for any other."""
    if node.op == "neg":
        return decimal_places(node.args[0])
    if node.op != "num" or "." not in node.name or "e" in node.name.lower():
        return -1
    whole, _, decimals = node.name.partition(".")
    return len(decimals) if len((whole + decimals).lstrip("0")) >= MIN_PLACES else 0


def ratio_sign(first: Node, second: Node) -> int | None:
    """The sign of the constant ratio of two formulas; 0 if it is not constant; None if that needs algebra."""
    names = variables(first) | variables(second)
    ratios = set()
    for number in range(_NUM_POINTS):
        point = {name: _coordinate(name, number) for name in names}
        values = evaluate(first, point), evaluate(second, point)
        if values[0] is None or values[1] is None:
            return None
        ratios.add(values[0] / values[1] if values[1] else Fraction(0))
    if len(ratios) > 1:
        return 0
    ratio = ratios.pop()
    return (ratio > 0) - (ratio < 0)
