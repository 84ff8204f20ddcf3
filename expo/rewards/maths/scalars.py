"""Parses answers that are no list: numbers with units, expressions, numerals in a base, times, ratios, words."""

import re
from fractions import Fraction
from typing import Final

from expo.rewards.maths.formula import MANY_ARGUMENTS, ONE_ARGUMENT, Node, parse_formula, variables
from expo.rewards.maths.kinds import Answer, Clock, Numeral, Opaque, Ratio, Scalar, Words
from expo.rewards.maths.units import split_unit
from expo.rewards.maths.values import rational

_BASE_NAMES: Final = {
    "two": "2", "three": "3", "four": "4", "five": "5", "six": "6", "seven": "7", "eight": "8", "nine": "9",
    "ten": "10", "eleven": "11", "twelve": "12", "sixteen": "16",
}  # fmt: skip
_NUMERAL = re.compile(r"\(?\s*(\d[\dA-F]*)\s*\)?\s*_\s*\{?\s*(?:\\text\{\s*)?(\d{1,2}|[a-z]+)\s*\}{0,2}")
_CLOCK = re.compile(r"(\d{1,3}):(\d{2})(?::(\d{2}))?\s*([ap])?\.?\s*(m)?\.?", re.IGNORECASE)
_HOUR = re.compile(r"(\d{1,2})\s*([ap])\.?\s*m\.?", re.IGNORECASE)
_TEXT = re.compile(r"\\text\{([^{}]*)\}")
_MIXED = re.compile(r"(?<![\d/.])(\d+) (\d+)/(\d+)(?![\d/.])")
_HYPHENATED = re.compile(r"(?=.*[A-Za-z]{4})[A-Za-z]{2,}(?:-[A-Za-z]+)+")
_LETTERS = re.compile(r"[A-Za-z]{2,}")
# letters, digits and the marks of prose; a hyphen at the end belongs to an incomplete formula
_WORDS = re.compile(r"[^\W_](?:[\w\s,.;:'\"()&%?!-]*[\w'.)%!\"])?")
_TWO_LETTERS = re.compile(r"[^\W\d_]{2}|[\u4e00-\u9fff]")
_LONGEST_PRODUCT: Final = 3  # letters: "xyz" is a product, "abcd" a word
_WORD_IN_FORMULA = re.compile(r"(?<![\\A-Za-z{])[A-Za-z]{4,}(?![A-Za-z])")
_SHORT_WORDS = frozenset({"no", "yes", "odd", "red", "one", "two", "six", "ten"})
_MAX_NUMBER: Final = 10**30  # of a number multiplied by "million"


def parse_scalar(text: str) -> Answer:
    """The answer that a text without lists, brackets and relations states; `Opaque` if no kind fits."""
    if _LETTERS.fullmatch(text):
        return _letters(text)
    if _HYPHENATED.fullmatch(text):
        return Words(text.casefold())
    found = _marked_number(_TEXT.sub(r"\1", text).strip(), text)
    if found is not None:
        return found
    number = _with_unit(_MIXED.sub(r"\1\\frac{\2}{\3}", text))
    if number is not None:
        return number
    plain = _TEXT.sub(r"\1", text).strip()
    if _WORDS.fullmatch(plain) and _TWO_LETTERS.search(plain):
        return Words(" ".join(plain.rstrip(".").split()).casefold())
    if r"\text{" in text and text.count("{") == text.count("}") and not text.rstrip().endswith(("-", "+", "=", "\\")):
        return Words(re.sub(r"\s+", "", plain).casefold())  # prose with formulas
    return Opaque(text)


def word(text: str) -> Words | None:
    """A text that is one run of letters; None for any other."""
    return Words(text.strip().casefold()) if _LETTERS.fullmatch(text.strip()) else None


def _letters(text: str) -> Answer:
    """A run of letters: a product of up to three different small letters, else a word."""
    is_product = text.islower() and len(set(text)) == len(text) <= _LONGEST_PRODUCT
    node = parse_formula(text) if is_product and text not in _SHORT_WORDS else None
    return Words(text.casefold()) if node is None else Scalar(text, node)


def _marked_number(plain: str, text: str) -> Answer | None:
    """A numeral in a base, a time, or a ratio."""
    numeral = _NUMERAL.fullmatch(plain)
    if numeral:
        base = _BASE_NAMES.get(numeral[2], numeral[2])
        if base.isdigit() and base != "10":
            return Numeral(numeral[1].lstrip("0") or "0", base)
        return _with_unit(numeral[1]) if base == "10" else None
    clock = _CLOCK.fullmatch(plain)
    if clock and bool(clock[4]) == bool(clock[5]):
        half = f"{clock[4]}m".lower() if clock[4] else ""
        return Clock(tuple(int(part) for part in clock.groups()[:3] if part is not None), half)
    hour = _HOUR.fullmatch(plain)
    if hour:
        return Clock((int(hour[1]), 0), f"{hour[2]}m".lower())
    if ":" in text:
        parts = [_with_unit(part.strip()) for part in text.split(":")]
        known = [part for part in parts if part is not None]
        return Ratio(tuple(known)) if len(known) == len(parts) else None
    return None


def _has_words(text: str) -> bool:
    """Whether a text has runs of letters that are no product: "no solution"."""
    return any(run[0] not in ONE_ARGUMENT | MANY_ARGUMENTS for run in _WORD_IN_FORMULA.finditer(text))


def _with_unit(text: str) -> Scalar | None:
    tail = split_unit(text)
    if tail is None:
        return None
    node = None if _has_words(tail.head) else parse_formula(tail.head)
    if node is None:
        return None
    if tail.factor != 1:
        value = rational(node)
        if value is None or variables(node) or abs(value * tail.factor) > _MAX_NUMBER:
            return None
        node = _number(value * tail.factor)
        return Scalar(f"{value * tail.factor}", node, tail.unit)
    return Scalar(tail.head, node, tail.unit)


def _number(value: Fraction) -> Node:
    whole = Node("num", name=str(abs(value.numerator)))
    node = whole if value.denominator == 1 else Node("frac", (whole, Node("num", name=str(value.denominator))))
    return Node("neg", (node,)) if value < 0 else node
