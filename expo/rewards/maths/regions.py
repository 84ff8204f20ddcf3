"""Unions of intervals, from brackets and from solved inequalities."""

from collections.abc import Sequence
from itertools import pairwise

from expo.rewards.maths.formula import Node
from expo.rewards.maths.kinds import Answer, Bracketed, Collection, Empty, Interval, Region, Scalar
from expo.rewards.maths.surds import monomial


def region_of_bracket(answer: Answer) -> Region | None:
    """The numbers that a bracket, a set of points or a region holds; None for any other answer."""
    if isinstance(answer, Region):
        return answer
    if isinstance(answer, Collection) and answer.is_set:
        return Region(tuple(Interval(point, True, point, True) for point in answer.members))
    if isinstance(answer, Collection):
        # intervals joined by commas or "and" are a union
        parts = [region_of_bracket(member) for member in answer.members]
        known = [part for part in parts if part is not None]
        return combined(known, "or") if len(known) == len(parts) else None
    if isinstance(answer, Empty):
        return Region(())
    if not isinstance(answer, Bracketed) or len(answer.members) != 2:
        return None
    low, high = answer.members
    has_low, has_high = answer.opening == "[" and not is_infinite(low), answer.closing == "]" and not is_infinite(high)
    if is_infinite(low) > 0 or is_infinite(high) < 0:
        return None
    return Region(
        (Interval(None if is_infinite(low) else low, has_low, None if is_infinite(high) else high, has_high),)
    )


def union(points: Sequence[Answer]) -> Region | None:
    """All real numbers but these; None if their order is unknown."""
    keyed = sorted(((approximate(point), point) for point in points), key=lambda pair: pair[0] or 0.0)
    if any(value is None for value, _ in keyed):
        return None
    ends = [None, *(point for _, point in keyed), None]
    return Region(tuple(Interval(low, False, high, False) for low, high in pairwise(ends)))


def is_infinite(answer: Answer) -> int:
    """1 for infinity, -1 for minus infinity, 0 for any other answer."""
    if not isinstance(answer, Scalar):
        return 0
    node, sign = answer.node, 1
    if node.op == "neg":
        node, sign = node.args[0], -1
    return sign if node == Node("const", name="infty") else 0


def approximate(answer: Answer | None) -> float | None:
    """The value of a real number in floating point, to order ends of intervals; None if it is unknown."""
    if not isinstance(answer, Scalar):
        return None
    return _float(answer.node)


def _float(node: Node) -> float | None:
    value = monomial(node)
    try:
        if value is not None:
            root = float(value.square) ** 0.5
            return (
                None
                if value.i
                else value.sign * root * 3.141592653589793 ** float(value.pi) * 2.718281828459045 ** float(value.e)
            )
        parts = [_float(arg) for arg in node.args]
        known = [part for part in parts if part is not None]
        if len(known) < len(parts):
            return None
        if node.op == "add":
            return sum(known)
        if node.op == "neg":
            return -known[0]
        if node.op in ("frac", "div"):
            return known[0] / known[1]
        if node.op == "mul":
            product = 1.0
            for part in known:
                product *= part
            return product
    except (OverflowError, ZeroDivisionError):
        return None
    return None


def combined(regions: Sequence[Region], mark: str) -> Region | None:
    """The union ("or") or the intersection ("and") of regions; after a comma, the union if they are disjoint.

    None if their variables differ, or if the order of their ends is unknown.
    """
    names = {region.variable for region in regions if region.variable}
    if len(names) > 1:
        return None
    name = names.pop() if names else ""
    common: Region | None = regions[0]
    if mark != "or":
        for region in regions[1:]:
            common = None if common is None else _intersection(common, region)
        if common is None:
            return None
    if mark == "and" or (mark == "," and common is not None and common.pieces):
        return common and Region(common.pieces, name)
    return Region(tuple(piece for region in regions for piece in region.pieces), name)


def _intersection(first: Region, second: Region) -> Region | None:
    pieces = []
    for one in first.pieces:
        for other in second.pieces:
            low = _inner_end((one.low, one.has_low), (other.low, other.has_low), lower=True)
            high = _inner_end((one.high, one.has_high), (other.high, other.has_high), lower=False)
            if low is None or high is None:
                return None
            start, end = approximate(low[0]), approximate(high[0])
            if start is None or end is None or start < end or (start == end and low[1] and high[1]):
                pieces.append(Interval(low[0], low[1], high[0], high[1]))
    return Region(tuple(pieces))


End = tuple[Answer | None, bool]


def _inner_end(one: End, other: End, *, lower: bool) -> End | None:
    """The end of an intersection: the larger of two lower ends, the smaller of two upper ones."""
    if one[0] is None or other[0] is None:
        return other if one[0] is None else one
    values = approximate(one[0]), approximate(other[0])
    if values[0] is None or values[1] is None:
        return None
    if values[0] == values[1]:
        return one if not one[1] else other
    return one if (values[0] > values[1]) == lower else other


def finite_points(region: Region) -> tuple[Answer, ...] | None:
    """The members of a region that is a set of points; None if it holds an interval."""
    points = tuple(piece.low for piece in region.pieces if piece.low is not None and piece.low == piece.high)
    return points if len(points) == len(region.pieces) else None
