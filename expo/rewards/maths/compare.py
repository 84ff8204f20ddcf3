"""Compares a stated answer with the gold answer, kind by kind; `docs/verifier.md` is the rule.

Formulas are compared by an `Algebra`: in the trainer's process by rational arithmetic, which leaves some comparisons
undecided, and in the worker processes by computer algebra.
"""

import re
from collections.abc import Callable, Iterable, Sequence
from enum import IntEnum
from fractions import Fraction
from typing import Protocol, TypeVar

from expo.rewards.maths.forms import is_unevaluated
from expo.rewards.maths.formula import Node, variables
from expo.rewards.maths.kinds import (
    Answer,
    Assignment,
    Bracketed,
    Calculation,
    Choice,
    Clock,
    Collection,
    Empty,
    Interval,
    Matrix,
    Numeral,
    Opaque,
    Ratio,
    Region,
    Relation,
    Scalar,
    Words,
)
from expo.rewards.maths.parse import readings
from expo.rewards.maths.regions import finite_points, region_of_bracket
from expo.rewards.maths.surds import equal, ratio_sign
from expo.rewards.maths.values import rational

Part = TypeVar("Part", Answer, Interval)


class Outcome(IntEnum):
    """The result of a comparison; the smallest of several parts is that of the whole."""

    WRONG = 0
    UNKNOWN = 1
    """It needs algebra, or more of it than a worker has."""
    UNEVALUATED = 2
    """Of equal value, but written as an operation that is still to be computed."""
    CORRECT = 3


class Algebra(Protocol):
    """Compares formulas; None: undecided."""

    def equal(self, gold: Node, stated: Node) -> bool | None:
        """Whether two formulas have the same value everywhere."""

    def ratio_sign(self, gold: Node, stated: Node) -> int | None:
        """The sign of the constant ratio of two formulas; 0 if it is not constant."""

    def same_text(self, gold: str, stated: str) -> bool | None:
        """Whether two texts outside the grammar are equal formulas."""


class RationalAlgebra:
    """Rational arithmetic: cheap and bounded, for the trainer's process."""

    equal = staticmethod(equal)
    ratio_sign = staticmethod(ratio_sign)

    @staticmethod
    def same_text(gold: str, stated: str) -> bool | None:
        """None: texts outside the grammar need a parser of computer algebra."""
        return None if gold and stated else False


def judge(stated: str, gold: str, algebra: Algebra) -> Outcome:
    """Compares two undressed texts."""
    if stated == gold:
        return Outcome.CORRECT
    if stated.isdigit() and gold.isdigit() and stated.isascii() and gold.isascii():
        return Outcome.CORRECT if stated.lstrip("0") == gold.lstrip("0") else Outcome.WRONG
    comparison = _Comparison(algebra)
    outcomes = [
        comparison.compare(*_unwrapped(meant, answer))
        for meant in readings(gold, is_gold=True)
        for answer in readings(stated, is_gold=False)
    ]
    return Outcome.UNKNOWN if max(outcomes) == Outcome.UNEVALUATED and Outcome.UNKNOWN in outcomes else max(outcomes)


def is_opaque(gold: str) -> bool:
    """Whether a gold answer is in no grammar, so that only math-verify can tell whether it is a formula."""
    return any(_has_opaque(answer) for answer in readings(gold, is_gold=True))


def _has_opaque(answer: Answer) -> bool:
    if isinstance(answer, Collection | Bracketed):
        return any(_has_opaque(member) for member in answer.members)
    if isinstance(answer, Assignment):
        return _has_opaque(answer.value)
    if isinstance(answer, Matrix):
        return any(_has_opaque(entry) for row in answer.rows for entry in row)
    return isinstance(answer, Opaque)


def _decided(is_equal: bool | None) -> Outcome:
    if is_equal is None:
        return Outcome.UNKNOWN
    return Outcome.CORRECT if is_equal else Outcome.WRONG


_UNORDERED_LIMIT = 100  # members of a list whose order does not matter; each is compared with each
_SQUASHED = re.compile(r"\\text|[{}]|(?<!\w)\s+|\s+(?!\w)")


class _Comparison:
    """Compares typed answers; `algebra` compares the formulas in them."""

    def __init__(self, algebra: Algebra) -> None:
        self._algebra = algebra
        self._by_kind: dict[type, Callable[..., Outcome]] = {
            Scalar: self._scalars,
            Words: lambda gold, stated: _decided(gold.text == stated.text),
            Numeral: lambda gold, stated: _decided(gold == stated),
            Clock: lambda gold, stated: _decided(_of_day(gold) == _of_day(stated)),
            Ratio: lambda gold, stated: self._each(gold.parts, stated.parts),
            Bracketed: self._brackets,
            Collection: self._collections,
            Region: self._regions,
            Relation: self._relations,
            Matrix: self._matrices,
            Empty: lambda gold, stated: _decided(gold == stated),
        }

    def compare(self, gold: Answer, stated: Answer) -> Outcome:
        """The outcome for two typed answers."""
        if isinstance(gold, Choice) or isinstance(stated, Choice):
            return self._choices(gold, stated)
        if isinstance(gold, Opaque) or isinstance(stated, Opaque):
            return self._opaque(gold, stated)
        if isinstance(gold, Calculation):
            return self.compare(gold.value, stated)
        if isinstance(stated, Calculation):
            steps = min(self._values(stated.value, step) for step in stated.steps)
            return min(self.compare(gold, stated.value), steps)
        if isinstance(gold, Assignment) or isinstance(stated, Assignment):
            return self._assignments(gold, stated)
        gold, stated = _as_same_kind(gold, stated)
        if type(gold) is not type(stated):
            return self._across_kinds(gold, stated)
        return self._by_kind[type(gold)](gold, stated)

    def _values(self, gold: Answer, stated: Answer) -> Outcome:
        """As `compare`, for a step of a calculation: an operation there is not the answer."""
        outcome = self.compare(gold, stated)
        return Outcome.CORRECT if outcome == Outcome.UNEVALUATED else outcome

    def _each(self, gold: Sequence[Answer], stated: Sequence[Answer]) -> Outcome:
        """Compares members in order."""
        if len(gold) != len(stated):
            return Outcome.WRONG
        return _all(self.compare(one, other) for one, other in zip(gold, stated, strict=True))

    @staticmethod
    def _unordered(gold: Sequence[Part], stated: Sequence[Part], compare: Callable[[Part, Part], Outcome]) -> Outcome:
        """Pairs each gold member with another stated one; equality is transitive, so the first equal one will do."""
        if len(gold) != len(stated) or len(gold) > _UNORDERED_LIMIT:
            return Outcome.WRONG
        worst, rest = Outcome.CORRECT, list(stated)
        for member in gold:
            best, found = Outcome.WRONG, 0
            for index, other in enumerate(rest):
                outcome = compare(member, other)
                if outcome > best:
                    best, found = outcome, index
                if best == Outcome.CORRECT:
                    break
            if best == Outcome.WRONG:
                return best
            worst = min(worst, best)
            if best != Outcome.UNKNOWN:
                del rest[found]
        return worst

    def _scalars(self, gold: Scalar, stated: Scalar) -> Outcome:
        if "%" in (gold.unit, stated.unit):
            return self._percents(gold, stated)
        if gold.unit and stated.unit and gold.unit != stated.unit:
            return Outcome.WRONG
        return self._nodes(gold.node, stated.node)

    def _nodes(self, gold: Node, stated: Node) -> Outcome:
        outcome = _decided(self._algebra.equal(gold, stated))
        return Outcome.UNEVALUATED if outcome == Outcome.CORRECT and is_unevaluated(gold, stated) else outcome

    def _percents(self, gold: Scalar, stated: Scalar) -> Outcome:
        """A percentage is its hundredth; a sign left out is forgiven where the figure is 1 or more."""
        if gold.unit == stated.unit:
            return self._nodes(gold.node, stated.node)
        if "" not in (gold.unit, stated.unit):
            return Outcome.WRONG
        figure = rational(gold.node)
        if figure is not None and figure >= 1:
            outcome = self._nodes(gold.node, stated.node)
            if outcome != Outcome.WRONG:
                return outcome
        percent, plain = (gold, stated) if gold.unit else (stated, gold)
        hundredth = Node("frac", (percent.node, Node("num", name="100")))
        outcome = _decided(self._algebra.equal(*((hundredth, plain.node) if gold.unit else (plain.node, hundredth))))
        is_open = outcome == Outcome.CORRECT and is_unevaluated(gold.node, stated.node)
        return Outcome.UNEVALUATED if is_open else outcome

    def _opaque(self, gold: Answer, stated: Answer) -> Outcome:
        texts = [getattr(answer, "text", None) for answer in (gold, stated)]
        if texts[0] is None or texts[1] is None or isinstance(gold, Words) or isinstance(stated, Words):
            return Outcome.WRONG
        if _squash(texts[0]) == _squash(texts[1]):
            return Outcome.CORRECT
        outcome = _decided(self._algebra.same_text(texts[0], texts[1]))
        # an integral or a sum where the gold answer is none
        is_open = outcome == Outcome.CORRECT and isinstance(stated, Opaque) and not isinstance(gold, Opaque)
        return Outcome.UNEVALUATED if is_open else outcome

    def _choices(self, gold: Answer, stated: Answer) -> Outcome:
        letters = [_letter(answer) for answer in (gold, stated)]
        if letters[0] and letters[1]:
            outcome = _decided(letters[0] == letters[1])
            values = [answer.value if isinstance(answer, Choice) else None for answer in (gold, stated)]
            return min(outcome, self.compare(values[0], values[1])) if values[0] and values[1] else outcome
        if isinstance(gold, Choice) and gold.value:
            return self.compare(gold.value, stated)
        if isinstance(stated, Choice) and stated.value:
            return self.compare(gold, stated.value)
        return Outcome.WRONG

    def _assignments(self, gold: Answer, stated: Answer) -> Outcome:
        equations = [answer.equation if isinstance(answer, Assignment) else answer for answer in (gold, stated)]
        are_equations = all(isinstance(equation, Relation) for equation in equations)
        if isinstance(gold, Assignment) and isinstance(stated, Assignment) and gold.name == stated.name:
            return self.compare(gold.value, stated.value)
        if isinstance(gold, Relation) or isinstance(stated, Relation) or are_equations:
            # "2x = 10" restates a question whose answer is x = 5; the equation of a line is its own answer
            if not (isinstance(equations[0], Relation) and isinstance(equations[1], Relation)):
                return Outcome.WRONG
            is_curve = isinstance(gold, Relation) or len(variables(_difference(equations[0]))) > 1
            return self._relations(equations[0], equations[1]) if is_curve else Outcome.WRONG
        if isinstance(gold, Assignment) and isinstance(stated, Assignment):
            return Outcome.WRONG
        if isinstance(gold, Assignment):
            return self.compare(gold.value, stated)
        return self.compare(gold, stated.value) if isinstance(stated, Assignment) else Outcome.WRONG

    def _relations(self, gold: Relation, stated: Relation) -> Outcome:
        if gold.operator != stated.operator:
            return Outcome.WRONG
        sign = self._algebra.ratio_sign(_difference(gold), _difference(stated))
        if sign is None:
            return Outcome.UNKNOWN
        return _decided(sign > 0 or (sign < 0 and gold.operator in ("=", r"\ne")))

    def _brackets(self, gold: Bracketed, stated: Bracketed) -> Outcome:
        regions = region_of_bracket(gold), region_of_bracket(stated)
        if regions[0] and regions[1] and len(gold.members) == 2:
            return self._regions(regions[0], regions[1])
        has_same_brackets = (gold.opening, gold.closing) == (stated.opening, stated.closing)
        if len(gold.members) == 2 and not has_same_brackets:
            return Outcome.WRONG
        return self._each(gold.members, stated.members)

    def _regions(self, gold: Region, stated: Region) -> Outcome:
        if gold.variable and stated.variable and gold.variable != stated.variable:
            return Outcome.WRONG
        return self._unordered(gold.pieces, stated.pieces, self._intervals)

    def _intervals(self, gold: Interval, stated: Interval) -> Outcome:
        if (gold.has_low, gold.has_high) != (stated.has_low, stated.has_high):
            return Outcome.WRONG
        ends = ((gold.low, stated.low), (gold.high, stated.high))
        if any((one is None) != (other is None) for one, other in ends):
            return Outcome.WRONG
        return _all(self.compare(one, other) for one, other in ends if one is not None and other is not None)

    def _collections(self, gold: Collection, stated: Collection) -> Outcome:
        names, stated_names = _names(gold), _names(stated)
        if names and stated_names:
            ordered = dict(zip(stated_names, stated.members, strict=True))
            if set(names) != set(stated_names):
                return Outcome.WRONG
            return self._each(gold.members, [ordered[name] for name in names])
        if names:  # the values in the order of the gold answer
            return self._each(_values(gold.members), _values(stated.members))
        return self._unordered(_values(gold.members), _values(stated.members), self.compare)

    def _matrices(self, gold: Matrix, stated: Matrix) -> Outcome:
        if len(gold.rows) != len(stated.rows):
            return Outcome.WRONG
        return _all(self._each(row, other) for row, other in zip(gold.rows, stated.rows, strict=True))

    def _across_kinds(self, gold: Answer, stated: Answer) -> Outcome:
        """Kinds that may state the same answer: names and tuples, points and regions, vectors, ratios, words."""
        kinds = (type(gold), type(stated))
        if kinds == (Collection, Bracketed) and isinstance(gold, Collection) and isinstance(stated, Bracketed):
            is_point = stated.opening == "(" and stated.closing == ")" and _names(gold)
            return self._each(_values(gold.members), stated.members) if is_point else Outcome.WRONG
        if kinds == (Bracketed, Collection) and isinstance(gold, Bracketed) and isinstance(stated, Collection):
            by_name = sorted(zip(_names(stated), _values(stated.members), strict=False))
            is_named = gold.opening == "(" and gold.closing == ")" and bool(by_name)
            return self._each(gold.members, [value for _, value in by_name]) if is_named else Outcome.WRONG
        if set(kinds) == {Scalar, Words}:
            texts = [answer.text for answer in (gold, stated) if isinstance(answer, Scalar | Words)]
            return _decided(all(text.isalpha() for text in texts) and texts[0].casefold() == texts[1].casefold())
        return Outcome.WRONG


def _all(outcomes: Iterable[Outcome]) -> Outcome:
    worst = Outcome.CORRECT
    for outcome in outcomes:
        if outcome == Outcome.WRONG:
            return outcome
        worst = min(worst, outcome)
    return worst


def _squash(text: str) -> str:
    return _SQUASHED.sub("", text).casefold()


def _letter(answer: Answer) -> str:
    if isinstance(answer, Choice):
        return answer.letter
    is_letter = isinstance(answer, Scalar) and answer.node.op == "sym" and len(answer.node.name) == 1
    return answer.node.name if is_letter and isinstance(answer, Scalar) else ""


def _difference(relation: Relation) -> Node:
    return Node("add", (relation.left, Node("neg", (relation.right,))))


def _names(answer: Collection) -> list[str]:
    """The names of a list of assignments to different names; empty for any other list."""
    names = [member.name for member in answer.members if isinstance(member, Assignment)]
    return names if len(set(names)) == len(answer.members) > 1 else []


def _values(members: Iterable[Answer]) -> tuple[Answer, ...]:
    return tuple(member.value if isinstance(member, Assignment) else member for member in members)


def _of_day(clock: Clock) -> tuple[int, ...]:
    """Hours, minutes and seconds, and whether the half of the day is known: 14:30 says so by itself."""
    hour, *rest = clock.parts
    if clock.half:
        hour = hour % 12 + (12 if clock.half == "pm" else 0)
    return (hour, *rest, 1 if clock.half or hour > 12 else 0)


def _as_same_kind(gold: Answer, stated: Answer) -> tuple[Answer, Answer]:
    """Two answers as one kind, where a notation of another kind says the same."""
    if isinstance(gold, Region) != isinstance(stated, Region):
        region, other = (gold, stated) if isinstance(gold, Region) else (stated, gold)
        found = region_of_bracket(other)
        if found is not None:
            return (region, found) if isinstance(gold, Region) else (found, region)
        points = finite_points(region) if isinstance(region, Region) else None
        if points:
            listed = Collection(points, is_set=True)
            return (listed, stated) if isinstance(gold, Region) else (gold, listed)
    return _as_scalar(gold, stated), _as_scalar(stated, gold)


def _unwrapped(gold: Answer, stated: Answer) -> tuple[Answer, Answer]:
    """Two answers; one of them without its braces if it is a set of one member and the other is no list."""
    if isinstance(gold, Collection) and len(gold.members) == 1 and not isinstance(stated, Collection):
        return gold.members[0], stated
    if isinstance(stated, Collection) and len(stated.members) == 1 and not isinstance(gold, Collection):
        return gold, stated.members[0]
    return gold, stated


def _as_scalar(answer: Answer, other: Answer) -> Answer:
    """A ratio of two numbers, or a row or column, as what the other answer is."""
    if isinstance(answer, Ratio) and isinstance(other, Scalar) and len(answer.parts) == 2:
        nodes = [part.node for part in answer.parts if isinstance(part, Scalar) and rational(part.node) != Fraction(0)]
        return Scalar("", Node("frac", tuple(nodes))) if len(nodes) == 2 else answer
    if isinstance(answer, Matrix) and isinstance(other, Bracketed) and (other.opening, other.closing) == ("(", ")"):
        entries = [entry for row in answer.rows for entry in row]
        if len(entries) in (len(answer.rows), len(answer.rows[0])):
            return Bracketed("(", tuple(entries), ")")
    return answer
