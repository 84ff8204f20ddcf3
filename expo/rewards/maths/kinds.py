"""The kinds of answers: what `parse.py` makes of a text, and `compare.py` compares."""

from dataclasses import dataclass

from expo.rewards.maths.formula import Node


@dataclass(frozen=True)
class Scalar:
    """A number or an expression with its unit; text: as written, unit left out."""

    text: str
    node: Node
    unit: str = ""


@dataclass(frozen=True)
class Opaque:
    """A text that is in no grammar here: compared as text, and as math-verify parses it."""

    text: str


@dataclass(frozen=True)
class Words:
    """Words, compared without regard to case and white space."""

    text: str


@dataclass(frozen=True)
class Choice:
    """The letter of a choice, and the value behind it if the answer states that too."""

    letter: str
    value: "Answer | None" = None


@dataclass(frozen=True)
class Numeral:
    """Digits in a base other than ten."""

    digits: str
    base: str


@dataclass(frozen=True)
class Clock:
    """A time of day or a duration in hours (or minutes); half: "am", "pm" or ""."""

    parts: tuple[int, ...]
    half: str


@dataclass(frozen=True)
class Ratio:
    """Numbers joined by colons."""

    parts: tuple["Answer", ...]


@dataclass(frozen=True)
class Bracketed:
    """An ordered list in brackets: a point, a tuple, or an interval; opening, closing: "(" or "[", ")" or "]"."""

    opening: str
    members: tuple["Answer", ...]
    closing: str


@dataclass(frozen=True)
class Collection:
    """Members whose order does not matter; is_set: written in braces."""

    members: tuple["Answer", ...]
    is_set: bool = False


@dataclass(frozen=True)
class Interval:
    """The numbers between two ends; None stands for an infinite end."""

    low: "Answer | None"
    has_low: bool
    high: "Answer | None"
    has_high: bool


@dataclass(frozen=True)
class Region:
    """A union of intervals; variable: the name that an inequality gives, "" without one."""

    pieces: tuple[Interval, ...]
    variable: str = ""


@dataclass(frozen=True)
class Assignment:
    """A name and its value: "x = 5", "f(x) = 2x + 1"; equation: both sides as formulas, if they are formulas."""

    name: str
    value: "Answer"
    equation: "Relation | None" = None


@dataclass(frozen=True)
class Calculation:
    """An equation between constants, "3 + 4 = 7": its last member is the answer if the others have the same value."""

    steps: tuple["Answer", ...]
    value: "Answer"


@dataclass(frozen=True)
class Relation:
    r"""An equation or an unsolved inequality; operator: "=", "<", "\\le", "\\ne", with the smaller side left."""

    operator: str
    left: Node
    right: Node


@dataclass(frozen=True)
class Matrix:
    """Rows of entries."""

    rows: tuple[tuple["Answer", ...], ...]


@dataclass(frozen=True)
class Empty:
    """The empty set."""


Answer = (
    Scalar | Opaque | Words | Choice | Numeral | Clock | Ratio | Bracketed | Collection | Region | Assignment
    | Calculation | Relation | Matrix | Empty
)  # fmt: skip
