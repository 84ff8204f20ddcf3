r"""Parses an undressed answer into its kind (`kinds.py`): lists and brackets from outside in, then what they hold.

A text may have two readings: "1,100" is one number, or a list of two. A bare gold answer has the first, because a
list is written with spaces; a reply may have meant either, and the gold answer tells which.
"""

import functools
import re
from collections.abc import Iterable
from typing import Final

from expo.rewards.maths.dressing import CACHE_SIZE
from expo.rewards.maths.formula import parse_formula
from expo.rewards.maths.kinds import Answer, Assignment, Bracketed, Choice, Collection, Empty, Matrix, Opaque, Region
from expo.rewards.maths.regions import combined, region_of_bracket, union
from expo.rewards.maths.relations import parse_relation, relation_operator
from expo.rewards.maths.scalars import parse_scalar, word

_MAX_DEPTH: Final = 8  # of lists in lists
_THOUSANDS = re.compile(r"(?<![\d.,])[1-9]\d{0,2}(?:,\d{3})+(?!\d|,\d)")
_ZEROS = re.compile(r",0\d")
_SPACED_THOUSANDS = re.compile(r"(?<![\d.,])[1-9]\d{0,2}(?: \d{3})+(?![\d/])")
_BRACKETS: Final = {"(": ")", "[": "]", r"\{": r"\}", r"\langle": r"\rangle"}
_TOKEN = re.compile(r"\\[A-Za-z]+|\\.|.", re.DOTALL)
_OPENING: Final = ("(", "[", "{", r"\{", r"\langle", r"\lfloor", r"\lceil", r"\begin")
_CLOSING: Final = (")", "]", "}", r"\}", r"\rangle", r"\rfloor", r"\rceil", r"\end")
_CONNECTIVE = re.compile(r"\\text\{\s*,?\s*(and|or)\s*\}|\\(lor|land)(?![A-Za-z])")
_MATRIX = re.compile(r"\\begin\{([pbvBV]?matrix|array)\}(?:\{[^{}]*\})?(.*)\\end\{\1\}", re.DOTALL)
_CHOICE = re.compile(r"\(([A-Z])\)(?:[.:]?\s+(\S.*))?|([A-Z])[.):]\s+(\S.*)|([A-Z])[.):]", re.DOTALL)
_NAMED_CHOICE = re.compile(
    r"(?:the )?(?:option|choice|answer|选项|选)\s*(?:is\s*)?:?\s*\(?([A-Z])\)?\.?", re.IGNORECASE
)
_TEXT = re.compile(r"\\text\{([^{}]*)\}")
_SET_BUILDER = re.compile(r"\s*([^|:]*?)\s*(?:\||:)\s*(.+)", re.DOTALL)
_REALS = re.compile(r"\\mathbb\s*\{?\s*R\s*\}?")
_FRENCH = re.compile(r"[\[\]]([^\[\]]*)[\[\]]")
_UNION = re.compile(r"(?<=[\])}])\s*U\s*(?=[\[(\\])")


def readings(text: str, *, is_gold: bool) -> list[Answer]:
    """What an undressed answer may mean, the likelier first."""
    if text.isascii() and text.isdigit():
        return [parse_answer(text)]
    joined = _SPACED_THOUSANDS.sub(lambda group: group[0].replace(" ", ""), text)
    joined = _THOUSANDS.sub(lambda group: group[0].replace(",", ""), joined)
    if joined == text:
        return [parse_answer(text)]
    is_bracketed = text.startswith(tuple(_BRACKETS)) and text.endswith(tuple(_BRACKETS.values()))
    if is_bracketed and not re.search(r",\s", text):
        return [parse_answer(text)]
    if is_gold and not is_bracketed:
        return [parse_answer(joined)]
    # no member of a list is written 000
    return [parse_answer(joined), *([] if _ZEROS.search(text) else [parse_answer(text)])]


@functools.lru_cache(maxsize=CACHE_SIZE)
def parse_answer(text: str) -> Answer:
    """The typed answer; `Opaque` if no kind fits."""
    return _parse(text, 0)


def _parse(text: str, depth: int) -> Answer:
    text = text.strip()
    if depth > _MAX_DEPTH or not text:
        return Opaque(text)
    if text.isalnum() and text.isascii():
        return parse_scalar(text)
    whole = _TEXT.fullmatch(text)
    if whole:
        # "\text{no}" is a word, though "no" could be a product
        return word(whole[1]) or _parse(whole[1], depth + 1)
    choice = _choice(text, depth)
    if choice is not None:
        return choice
    text = _UNION.sub(r"\\cup ", _CONNECTIVE.sub(_bare_word, text))
    for words in ("or", "and"):
        parts = split_top(text, words)
        if len(parts) > 1:
            return _join([part.strip().strip(",") for part in parts], words, depth)
    for mark in (";", ","):
        parts = split_top(text, mark)
        if len(parts) > 1:
            return _join(parts, ",", depth)
    if relation_operator(text):
        return parse_relation(text, lambda part: _parse(part, depth + 1))
    found = _parse_set(text, depth) or _parse_bracketed(text, depth)
    if found is None and (r"\pm" in text or r"\mp" in text):
        signs = [text.replace(r"\pm", a).replace(r"\mp", b) for a, b in (("+", "-"), ("-", "+"))]
        return Collection(tuple(_parse(part, depth + 1) for part in signs))
    return found or parse_scalar(text)


def _bare_word(connective: re.Match[str]) -> str:
    return f" {connective[1] or connective[2].removeprefix('l').removesuffix('d').replace('an', 'and')} "


def _join(parts: list[str], mark: str, depth: int) -> Answer:
    flat = _flat(_parse(part, depth + 1) for part in parts if part.strip())
    if flat and all(isinstance(member, Region) for member in flat):
        region = combined([member for member in flat if isinstance(member, Region)], mark)
        return Opaque(mark.join(parts)) if region is None else region
    return flat[0] if len(flat) == 1 else Collection(flat)


def split_top(text: str, mark: str) -> list[str]:
    """The parts of a text between marks that are in no bracket; a mark of letters is a word of its own."""
    if mark not in text:
        return [text]
    parts, depth, start = [], 0, 0
    is_word = mark.isalpha()
    for token in _TOKEN.finditer(text):
        if token[0] in _OPENING:
            depth += 1
        elif token[0] in _CLOSING:
            depth -= 1
        elif not depth and token[0] == mark[0] and text.startswith(mark, token.start()):
            end = token.start() + len(mark)
            if is_word and (text[token.start() - 1 : token.start()].strip() or text[end : end + 1].strip()):
                continue
            parts.append(text[start : token.start()])
            start = end
        elif not depth and token[0] == mark:
            parts.append(text[start : token.start()])
            start = token.end()
    return [*parts, text[start:]]


def _choice(text: str, depth: int) -> Answer | None:
    plain = _TEXT.sub(r"\1", text).strip()
    match = _CHOICE.fullmatch(plain)
    if match:
        letter, value = match[1] or match[3] or match[5], match[2] or match[4]
        return Choice(letter, _parse(value, depth + 1) if value else None)
    match = _NAMED_CHOICE.fullmatch(plain)
    return Choice(match[1].upper()) if match else None


def _parse_set(text: str, depth: int) -> Answer | None:
    if text in (r"\emptyset", r"\{\}", r"\{ \}"):
        return Empty()
    if text.startswith(r"\begin"):
        matrix = _MATRIX.fullmatch(text)
        return matrix and _matrix(matrix[2], depth)
    if text.startswith(r"\mathbb"):
        if _REALS.fullmatch(text):
            return union([])
        excluded = _REALS.sub("", text, count=1).strip().removeprefix(r"\setminus").strip()
        points = _parse(excluded, depth + 1) if _REALS.match(text) else None
        return union(points.members) if isinstance(points, Collection) and points.is_set else None
    if r"\cup" in text:
        parts = [_parse(part, depth + 1) for part in split_top(text, r"\cup")]
        if len(parts) > 1:
            regions = [region_of_bracket(part) for part in parts]
            known = [region for region in regions if region is not None]
            return combined(known, "or") if len(known) == len(parts) else None
    return None


def _matrix(body: str, depth: int) -> Answer:
    rows = [row for row in re.split(r"\\\\", body) if row.strip().replace(r"\hline", "").strip()]
    return Matrix(tuple(tuple(_parse(entry, depth + 1) for entry in row.split("&")) for row in rows))


def _parse_bracketed(text: str, depth: int) -> Answer | None:
    opening = next((bracket for bracket in _BRACKETS if text.startswith(bracket)), None)
    french = _FRENCH.fullmatch(text) if text[0] == "]" or text[-1] == "[" else None
    if french:
        text = {"]": "(", "[": "["}[text[0]] + french[1] + {"[": ")", "]": "]"}[text[-1]]
        opening = text[0]
    if opening is None:
        return None
    closing = next((bracket for bracket in _BRACKETS.values() if text.endswith(bracket)), None)
    if closing is None or not _is_closed_at_end(text):
        return None
    inner = text[len(opening) : -len(closing)].strip()
    if opening == r"\{":
        return _braced(inner, depth) if closing == r"\}" else None
    parts = next((parts for mark in (";", ",") if len(parts := split_top(inner, mark)) > 1), [inner])
    if len(parts) == 1:
        is_one = parse_formula(text) is None or re.fullmatch(r"\[.*\]|\(\s*-?[\d.]+\s*\)", text)
        return _parse(inner, depth + 1) if is_one and opening != r"\langle" else None
    brackets = (opening, closing) if opening in ("(", "[") and closing in (")", "]") else ("(", ")")
    return Bracketed(brackets[0], tuple(_parse(part, depth + 1) for part in parts), brackets[1])


def _is_closed_at_end(text: str) -> bool:
    """Whether the bracket that opens a text is closed by its last character, not earlier."""
    depth = 0
    for token in _TOKEN.finditer(text):
        depth += (token[0] in _OPENING) - (token[0] in _CLOSING)
        if not depth:
            return token.end() == len(text)
    return False


def _braced(inner: str, depth: int) -> Answer | None:
    builder = _SET_BUILDER.fullmatch(inner)
    if builder and relation_operator(builder[2]):
        found = _parse(builder[2], depth + 1)
        variable = builder[1].split(r"\in")[0].strip()
        return found if isinstance(found, Region) and found.variable == variable else None
    parts = split_top(inner, ",") if ";" not in inner else split_top(inner, ";")
    members = _flat(_parse(part, depth + 1) for part in parts)
    is_named = all(isinstance(member, Assignment) for member in members)
    return Collection(members, is_set=not is_named)


def _flat(members: Iterable[Answer]) -> tuple[Answer, ...]:
    """The members with those of lists among them: "1, 2 and 3" is one list; so is "\\pm 1, 2"."""
    flat: list[Answer] = []
    for member in members:
        is_list = isinstance(member, Collection) and not member.is_set
        flat += member.members if isinstance(member, Collection) and is_list else [member]
    return tuple(flat)
