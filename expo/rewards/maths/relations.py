r"""Parses equations, assignments and inequalities.

An inequality is solved if one side, or the middle, is a lone variable and the rest are constants; it then is a region
of numbers. Any other inequality restates a question, so it equals no interval.
"""

import re
from collections.abc import Callable
from typing import Final

from expo.rewards.maths.formula import parse_formula, variables
from expo.rewards.maths.kinds import (
    Answer,
    Assignment,
    Bracketed,
    Calculation,
    Collection,
    Empty,
    Interval,
    Opaque,
    Region,
    Relation,
    Scalar,
)
from expo.rewards.maths.regions import is_infinite, region_of_bracket, union

Parse = Callable[[str], Answer]
_TOKEN = re.compile(r"\\[A-Za-z]+|\\.|.", re.DOTALL)
_OPENING: Final = ("(", "[", "{", r"\{")
_CLOSING: Final = (")", "]", "}", r"\}")
_OPERATORS: Final = ("=", "<", ">", r"\le", r"\ge", r"\ne", r"\in", r"\approx")
_NAME_WITH_DIGITS = re.compile(r"_\s*(?:\{[^{}]*\}|\d+)|\([^()]*\)|\^\{?-1\}?")
_UNSUPPORTED = ("\\pmod", "\\bmod", "\\equiv", "\\to", "\\implies", "\\Rightarrow")


def _split(text: str) -> tuple[list[str], list[str]]:
    """The members of a chain of relations and the operators between them, outside brackets."""
    members, operators, depth, start = [], list[str](), 0, 0
    for token in _TOKEN.finditer(text):
        if token[0] in _OPENING:
            depth += 1
        elif token[0] in _CLOSING:
            depth -= 1
        elif not depth and token[0] in _OPERATORS:
            members.append(text[start : token.start()].strip())
            operators.append(token[0])
            start = token.end()
    return [*members, text[start:].strip()], operators


def relation_operator(text: str) -> str:
    """The first relation in a text outside brackets; "" if there is none."""
    if not any(mark in text for mark in _OPERATORS):
        return ""
    operators = _split(text)[1]
    return operators[0] if operators else ""


def parse_relation(text: str, parse: Parse) -> Answer:
    """The typed answer of a text with a relation; parse: for the sides of an assignment and the ends of an interval."""
    members, operators = _split(text)
    if not all(members[1:]) or any(mark in text for mark in _UNSUPPORTED):
        return Opaque(text)
    if not members[0]:  # "= 5"
        members, operators = members[1:], operators[1:]
        if not operators:
            return parse(members[0])
    if operators == [r"\in"]:
        return _membership(members[0], parse(members[1])) or Opaque(text)
    if set(operators) <= {"=", r"\approx"}:
        return _equation(members, operators, parse) or Opaque(text)
    return _inequality(members, operators, parse) or Opaque(text)


def _is_constant(text: str) -> bool:
    node = parse_formula(text)
    return node is not None and not variables(node)


def _is_variable(text: str) -> bool:
    node = parse_formula(text)
    return node is not None and node.op == "sym"


def _membership(name: str, members: Answer) -> Answer | None:
    if not _is_variable(name):
        return None
    region = region_of_bracket(members)
    if region is None or isinstance(members, Collection | Empty):
        return members if isinstance(members, Collection | Empty) else None
    return Region(region.pieces, name)


def _equation(members: list[str], operators: list[str], parse: Parse) -> Answer | None:
    if r"\approx" in operators:
        # the exact value before an approximation is the answer: "x = \frac13 \approx 0.33"
        first = operators.index(r"\approx")
        if _is_constant(members[first]):
            members = members[: first + 1]
    if len(members) == 1:
        return parse(members[0])
    if len(members) == 2 and _is_constant(members[0]) and _is_name(members[1]):
        members = members[::-1]  # "5 = x"
    values = [parse(member) for member in members]
    if _is_constant(members[0]):
        return Calculation(tuple(values[:-1]), values[-1]) if all(map(_is_constant, members)) else None
    relation = _relation("=", members[0], members[-1])
    if _is_name(members[0]):
        return Assignment(members[0].replace(" ", ""), values[-1], relation)
    return relation if len(members) == 2 else None


def _is_name(text: str) -> bool:
    """Whether the left side only names the answer: it has no number that could be part of the question."""
    is_numbered = any(char.isdigit() for char in _NAME_WITH_DIGITS.sub("", text))
    return any(char.isalpha() for char in text) and not is_numbered


def _relation(operator: str, left: str, right: str) -> Relation | None:
    sides = parse_formula(left), parse_formula(right)
    if sides[0] is None or sides[1] is None:
        return None
    if operator in (">", r"\ge"):
        return Relation("<" if operator == ">" else r"\le", sides[1], sides[0])
    return Relation(operator, sides[0], sides[1])


def _inequality(members: list[str], operators: list[str], parse: Parse) -> Answer | None:
    if len(members) == 2:
        left, right = members
        if _is_variable(left) and _is_constant(right):
            return _half_line(left, operators[0], parse(right))
        if _is_constant(left) and _is_variable(right):
            flipped = {"<": ">", ">": "<", r"\le": r"\ge", r"\ge": r"\le"}.get(operators[0], operators[0])
            return _half_line(right, flipped, parse(left))
        return _relation(operators[0], left, right) if operators[0] in ("<", ">", r"\le", r"\ge", r"\ne") else None
    if len(members) != 3 or not _is_variable(members[1]) or not (_is_constant(members[0]) and _is_constant(members[2])):
        return None
    if set(operators) <= {">", r"\ge"}:
        members, operators = (
            members[::-1],
            [operator.replace(">", "<").replace("ge", "le") for operator in operators[::-1]],
        )
    if not set(operators) <= {"<", r"\le"}:
        return None
    bracket = Bracketed(
        "(" if operators[0] == "<" else "[",
        (parse(members[0]), parse(members[2])),
        ")" if operators[1] == "<" else "]",
    )
    region = region_of_bracket(bracket)
    return region and Region(region.pieces, members[1])


def _half_line(name: str, operator: str, end: Answer) -> Answer | None:
    if not isinstance(end, Scalar):
        return None
    if operator == r"\ne":
        region = union([end])
        return region and Region(region.pieces, name)
    if operator not in ("<", ">", r"\le", r"\ge"):
        return None
    limit = None if is_infinite(end) else end
    has_end = operator in (r"\le", r"\ge") and limit is not None
    if operator in ("<", r"\le"):
        return Region((Interval(None, False, limit, has_end),), name)
    return Region((Interval(limit, has_end, None, False),), name)
