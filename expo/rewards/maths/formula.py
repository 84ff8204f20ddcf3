r"""Parses a formula without dressing into a tree: numbers, variables, fractions, powers, roots, common functions.

What the grammar does not know (sums, integrals, text, a missing brace) is no tree: `parse_formula` returns None. The
time is linear in the length, the depth is limited, and nothing is evaluated: `9^{9^{9}}` is a tree like any other.
"""

import functools
import re
from typing import Final, NamedTuple

_MAX_DEPTH: Final = 40  # of nested groups; published answers have at most 6
_CACHE_SIZE: Final = 32_768

_SPACE = re.compile(r"\s*")
_NUMBER = re.compile(r"(?:\d+(?:\.\d*)?|\.\d+)(?:[eE][+-]?\d{1,3}(?![\dA-Za-z.]))?", re.ASCII)
_DIGITS = re.compile(r"\d+", re.ASCII)
_COMMAND = re.compile(r"\\(?:[A-Za-z]+|.)", re.DOTALL)
_LETTERS = re.compile(r"[A-Za-z]+")
_OPERATOR_NAME = re.compile(r"\\operatorname\*?\s*\{\s*([A-Za-z]+)\s*\}")
_SUBSCRIPT = re.compile(r"_\s*(?:\{([^{}]*)\}|(\d+|\\[A-Za-z]+|[A-Za-z]))")
_PRIMES = re.compile(r"'+|\^\{?\\prime\}?")
_CIRCLE = re.compile(r"\^\s*(?:\{\s*\\circ\s*\}|\\circ)")

_ONE_ARGUMENT_NAMES = "sin cos tan cot sec csc arcsin arccos arctan sinh cosh tanh ln log lg exp"
ONE_ARGUMENT = frozenset(_ONE_ARGUMENT_NAMES.split())
MANY_ARGUMENTS = frozenset({"gcd", "lcm", "max", "min"})
_FUNCTIONS = ONE_ARGUMENT | MANY_ARGUMENTS
_GREEK_NAMES = (
    "alpha beta gamma delta epsilon zeta eta theta iota kappa lambda mu nu xi rho sigma tau upsilon phi chi psi omega "
    "Gamma Delta Theta Lambda Xi Pi Sigma Upsilon Phi Psi Omega ell hbar"
)
_GREEK = frozenset(_GREEK_NAMES.split())
_CLOSING: Final = {"(": ")", "[": "]", "{": "}", r"\{": r"\}"}
_TIMES: Final = ("*", r"\times", r"\cdot")
_DIVIDED: Final = ("/", r"\div")


class Node(NamedTuple):
    """A formula.

    op: "num", "sym", "const" (pi, e, i, infty, deg), "neg", "add", "mul", "frac" (the LaTeX command), "div" (a slash),
    "pow", "root" (radicand, index), "mixed" (whole number, fraction), "call"; args: the operands; name: digits of a
    number, or the name of a variable, constant or function.
    """

    op: str
    args: tuple["Node", ...] = ()
    name: str = ""


TWO: Final = Node("num", name="2")
_MINUS_ONE: Final = Node("neg", (Node("num", name="1"),))
_INVERSES: Final = ("sin", "cos", "tan")  # \sin^{-1} is arcsin, not a power


class _ParseError(Exception):
    """The text is not in the grammar."""


@functools.lru_cache(maxsize=_CACHE_SIZE)
def parse_formula(text: str) -> Node | None:
    """The tree of an undressed formula; None if the text is not in the grammar."""
    parser = _Parser(text)
    try:
        node = parser.sum()
    except _ParseError:
        return None
    return node if parser.token() == "" else None


@functools.lru_cache(maxsize=_CACHE_SIZE)
def variables(node: Node) -> frozenset[str]:
    """The names of the variables in a formula."""
    if node.op == "sym":
        return frozenset({node.name})
    return frozenset[str]().union(*(variables(arg) for arg in node.args))


class _Parser:
    """A recursive descent over the text; each method reads one rule of the grammar from the current position."""

    def __init__(self, text: str) -> None:
        self._text, self._at, self._depth = text, 0, 0

    def token(self) -> str:
        """The next command, digit or character, without reading it; "" at the end."""
        self._at = _SPACE.match(self._text, self._at).end()  # type: ignore[union-attr]
        command = _COMMAND.match(self._text, self._at)
        return command[0] if command else self._text[self._at : self._at + 1]

    def _skip(self, token: str) -> bool:
        if self.token() != token:
            return False
        self._at += len(token)
        return True

    def _expect(self, token: str) -> None:
        if not self._skip(token):
            raise _ParseError

    def _match(self, pattern: re.Pattern[str]) -> re.Match[str] | None:
        self.token()
        match = pattern.match(self._text, self._at)
        if match:
            self._at = match.end()
        return match

    def sum(self) -> Node:
        """Terms joined by plus and minus."""
        self._depth += 1
        if self._depth > _MAX_DEPTH:
            raise _ParseError
        terms = [self._signed_product()]
        while self.token() in ("+", "-"):
            terms.append(self._signed_product())
        self._depth -= 1
        return terms[0] if len(terms) == 1 else Node("add", tuple(terms))

    def _signed_product(self) -> Node:
        is_negative = False
        while (sign := self.token()) in ("+", "-"):
            if sign == "-" and is_negative:
                raise _ParseError  # "--5" is no usual notation
            is_negative = is_negative or sign == "-"
            self._at += 1
        product = self._product()
        return Node("neg", (product,)) if is_negative else product

    def _product(self) -> Node:
        left = self._power()
        factors = [left]
        while True:
            token = self.token()
            if token in _TIMES:
                self._at += len(token)
                factors.append(self._signed_power())
            elif token in _DIVIDED:
                self._at += len(token)
                dividend = factors[0] if len(factors) == 1 else Node("mul", tuple(factors))
                factors = [Node("div", (dividend, self._signed_power()), name=token)]
            elif self._starts_factor(token):
                factor = self._power()
                mixed = self._mixed(factors, factor)
                factors = [mixed] if mixed else [*factors, factor]
            else:
                break
        return factors[0] if len(factors) == 1 else Node("mul", tuple(factors))

    @staticmethod
    def _mixed(factors: list[Node], factor: Node) -> Node | None:
        r"""`1\frac{1}{2}` is a mixed number, not a product."""
        if len(factors) == 1 and factors[0].op == "num" and factor.op == "frac":
            digits = [part.name for part in (factors[0], *factor.args)]
            are_numbers = all(part.op == "num" and part.name.isdigit() for part in (factors[0], *factor.args))
            if are_numbers and int(digits[1]) < int(digits[2]):
                return Node("mixed", (factors[0], factor))
        return None

    @staticmethod
    def _starts_factor(token: str) -> bool:
        if token.startswith("\\"):
            name = token[1:]
            return name in _GREEK | _FUNCTIONS or name in (
                "pi", "infty", "frac", "sqrt", "binom", "lfloor", "lceil", "operatorname",
            )  # fmt: skip
        return (token.isascii() and token.isalpha()) or token in ("(", "[", "{")

    def _signed_power(self) -> Node:
        return Node("neg", (self._signed_power(),)) if self._skip("-") else self._power()

    def _power(self) -> Node:
        node = self._base()
        while True:
            if self._match(_CIRCLE):
                node = Node("mul", (node, Node("const", name="deg")))
            elif self._skip("^"):
                node = Node("pow", (node, self._exponent()))
            elif self._skip("!"):
                node = Node("call", (node,), "factorial")
            else:
                return node

    def _exponent(self) -> Node:
        if self._skip("-"):
            return Node("neg", (self._exponent(),))
        number = self._match(_NUMBER)  # "2^10" is plain text for 2^{10}
        return _number(number[0]) if number else self._argument()

    def _argument(self) -> Node:
        r"""What a command without braces takes: a group, a digit, a letter or a command (`\frac12`, `\frac\pi2`)."""
        token = self.token()
        if token == "{":
            return self._group("{")
        if token.isascii() and token.isdigit():
            self._at += 1
            return Node("num", name=token)
        if token.isascii() and token.isalpha():
            self._at += 1
            return _letter(token)
        return self._base()

    def _group(self, opening: str) -> Node:
        self._expect(opening)
        node = self.sum()
        self._expect(_CLOSING[opening])
        return node

    def _base(self) -> Node:
        number = self._match(_NUMBER)
        if number:
            return _number(number[0])
        token = self.token()
        if token in ("(", "[", "{"):
            return self._group(token)
        if token == "|":
            self._at += 1
            node = self.sum()
            self._expect("|")
            return Node("call", (node,), "abs")
        letters = self._match(_LETTERS)
        if letters:
            return self._word(letters)
        if token.startswith("\\"):
            operator = self._match(_OPERATOR_NAME)
            if operator is None:
                self._at += len(token)
            return self._command(operator[1] if operator else token[1:])
        raise _ParseError

    def _word(self, letters: re.Match[str]) -> Node:
        if letters[0] in _FUNCTIONS:
            return self._call(letters[0])
        self._at = letters.start() + 1
        return self._named(letters[0][0])

    def _named(self, name: str) -> Node:
        subscript = self._match(_SUBSCRIPT) if self.token() == "_" else None
        primes = self._match(_PRIMES)
        if subscript is None and primes is None:
            return _letter(name)
        mark = "" if subscript is None else "_" + (subscript[1] or subscript[2] or "").strip()
        return Node("sym", name=name + mark + ("'" * len(primes[0].replace("^", "")) if primes else ""))

    def _command(self, name: str) -> Node:
        if name in _FUNCTIONS:
            return self._call(name)
        if name in ("pi", "infty"):
            return Node("const", name=name)
        if name in _GREEK:
            return self._named(f"\\{name}")
        if name == "frac":
            return Node("frac", (self._argument(), self._argument()))
        if name == "binom":
            return Node("call", (self._argument(), self._argument()), "binomial")
        if name == "sqrt":
            index = TWO
            if self.token() == "[":
                index = self._group("[")
            return Node("root", (self._argument(), index))
        if name in ("lfloor", "lceil"):
            node = self.sum()
            self._expect(rf"\r{name[1:]}")
            return Node("call", (node,), "floor" if name == "lfloor" else "ceiling")
        raise _ParseError

    def _call(self, name: str) -> Node:
        exponent = self._exponent() if self._skip("^") else None
        base = self._argument_of_log() if name == "log" and self._skip("_") else None
        if exponent is None and self._skip("^"):
            exponent = self._exponent()
        token = self.token()
        if token in ("(", "[", "{"):
            self._at += 1
            args = [self.sum()]
            while name in MANY_ARGUMENTS and self._skip(","):
                args.append(self.sum())
            self._expect(_CLOSING[token])
        else:
            args = [self._bare_argument()]
        if exponent == _MINUS_ONE and name in _INVERSES:
            name, exponent = f"arc{name}", None
        node = Node("call", (*args, *([base] if base else [])), name)
        return Node("pow", (node, exponent)) if exponent else node

    def _argument_of_log(self) -> Node:
        number = self._match(_DIGITS)
        return _number(number[0]) if number else self._argument()

    def _bare_argument(self) -> Node:
        r"""The factors after a function without parentheses: `\sin 2x`."""
        factors = [self._signed_power()]
        while self._starts_factor(token := self.token()) and token[1:] not in _FUNCTIONS and token not in ("(", "["):
            factors.append(self._power())
        return factors[0] if len(factors) == 1 else Node("mul", tuple(factors))


def _letter(name: str) -> Node:
    return Node("const", name=name) if name in ("e", "i") else Node("sym", name=name)


def _number(text: str) -> Node:
    return Node("num", name=text)
