r"""Answers: extracting them from replies, normalising them, and the comparisons that need no computer algebra.

The answer of a reply is the content of its last `\boxed{...}`, or the text after its last `Answer:` at the start of a
line (the format of DAPO, arXiv 2503.14476), whichever comes later. Boxes separated only by "and", "or" or a comma are
one list, in which every member must be right. Earlier boxes count as working, not as answers, so listing guesses earns
nothing. (math-verify by itself joins boxes up to 70 characters apart and grades two different ones as wrong.)
A box without its closing brace (a truncated reply) or without content does not count.
"""

import functools
import re
from typing import Final

# Longer "answers" are text inside an unfinished box; gold answers have at most a few hundred characters.
MAX_ANSWER_CHARS: Final = 2_000
# Normal forms cached: the distinct answers of about 12 steps of 2,048 replies; about 10 MB.
_CACHE_SIZE: Final = 32_768

_BRACES = re.compile(r"\\\\?(?:boxed|fbox)\s*\{|\\.|[{}]", re.DOTALL)
_ANSWER_LINE = re.compile(
    r"^[^\w\n]*(?:(?:so|thus|hence|therefore|the|my|final|correct)[^\w\n]+)*answer(?:\*\*)?\s*[:：](?:\*\*)?\s*([^\n]+)",
    re.IGNORECASE | re.MULTILINE,
)
_LIST_GLUE = re.compile(r"(?:[\s$,;]|\\[()\[\],;]|\\q?quad|(?:\\text\s*\{\s*)?\b(?:and|or)\b(?:\s*\})?)*")


def extract_answer(reply: str) -> str | None:
    """The answer a reply states, as written; None if it states none.

    Args:
        reply: The whole reply of the model; the time is linear in its length.
    """
    boxes = _find_boxes(reply)
    answer_line = None
    for answer_line in _ANSWER_LINE.finditer(reply):  # noqa: B007 (the loop finds the last one)
        pass
    if answer_line is not None and (not boxes or boxes[-1][2] < answer_line.start()):
        answer = answer_line[1].strip().strip("*").strip()
        if _INNER_BOX.search(answer):
            return None  # truncated inside its box
    elif boxes:
        answer = _join_last_boxes(reply, boxes)
    else:
        return None
    return answer if len(answer) <= MAX_ANSWER_CHARS and normalise(answer) else None


def has_box(reply: str) -> bool:
    """Whether a reply has a complete, non-empty box."""
    return bool(_find_boxes(reply))


def _find_boxes(reply: str) -> list[tuple[int, int, int]]:
    """Complete boxes in order of their end: start of the command, start and end of the content."""
    if "box" not in reply:
        return []
    boxes = []
    open_braces: list[tuple[int, int] | None] = []
    for token in _BRACES.finditer(reply):
        text = token[0]
        if text == "{":
            open_braces.append(None)
        elif text == "}":
            opening = open_braces.pop() if open_braces else None
            if opening is not None:
                boxes.append((*opening, token.start()))
        elif text.endswith("{") and "box" in text:
            open_braces.append((token.start(), token.end()))
    return [(start, inner, end) for start, inner, end in boxes if reply[inner:end].strip()]


def _join_last_boxes(reply: str, boxes: list[tuple[int, int, int]]) -> str:
    start, inner, end = boxes[-1]
    members = {reply[inner:end].strip(): None}  # an ordered set
    for earlier_start, earlier_inner, earlier_end in reversed(boxes[:-1]):
        if earlier_end > start:
            continue  # nested in a box that is a member already
        glue = reply[earlier_end + 1 : start]
        # "\boxed{5} \boxed{5}" states 5 once; white space alone does not make a list either
        if not glue.strip() or not _LIST_GLUE.fullmatch(glue):
            break
        members[reply[earlier_inner:earlier_end].strip()] = None
        start = earlier_start
    return ", ".join(reversed(members))


_UNICODE = str.maketrans(
    {
        "−": "-",
        "–": "-",
        "﹣": "-",
        "×": r"\times ",
        "·": r"\cdot ",
        "⋅": r"\cdot ",
        "÷": r"\div ",
        "±": r"\pm ",
        "π": r"\pi ",
        "∞": r"\infty ",
        "≤": r"\le ",
        "≥": r"\ge ",
        "≠": r"\ne ",
        "∪": r"\cup ",
        "∩": r"\cap ",
        "∈": r"\in ",
        "∅": r"\emptyset ",
        "°": r"^\circ ",
        "²": "^{2}",
        "³": "^{3}",
        "½": r"\frac{1}{2}",
        "⅓": r"\frac{1}{3}",
        "⅔": r"\frac{2}{3}",
        "¼": r"\frac{1}{4}",
        "¾": r"\frac{3}{4}",
        "⁄": "/",
        "\u00a0": " ",
        "\u202f": " ",
        "\u2009": " ",
        # the full-width forms of ASCII, from Chinese keyboards
        **{chr(code + 0xFEE0): chr(code) for code in range(0x21, 0x7F)},
    }
)
_UNICODE_ROOT = re.compile(r"√\s*(?:\(([^()]*)\)|(\w+))")
_WRAPPERS = (("\\(", "\\)"), ("\\[", "\\]"), ("**", "**"), ("`", "`"))
_INNER_BOX = re.compile(r"\\(?:boxed|fbox)\s*(?=\{)")
_THIN_SPACE = re.compile(r"(?<!\\)\\[,;:]|~")
_FINAL_STOP = re.compile(r"\s*(?<!\\right)[.,;]\s*\Z")
_BRACED = re.compile(r"\A\s*\{([^{}]*)\}\s*\Z")
_REPEATING = re.compile(r"(?<![\d.])(\d+)\.(\d*)\\(?:overline|bar)\s*\{?(\d+)\}?")
_NUMBER = re.compile(
    # no group of thousands begins with 0: "0,100" is two numbers
    r"([+-]?)\s?(?:([1-9]\d{0,2}(?:,\d{3})+|[1-9]\d{0,2}(?: \d{3})+|\d+)(?:\.(\d*))?|\.(\d+))(?:[eE]([+-]?\d{1,3}))?",
    re.ASCII,
)
_ZERO_FIRST = re.compile(r"\A([+-]?0),(?=\d)")
_GROUP_MARKS = ("{,}", r"\!", r"\,")  # they separate thousands, never the members of a list
_OPENING, _CLOSING = ("(", "[", "{"), (")", "]", "}")
# of the members of a list; a comma before three digits, without a space, separates thousands
_SEPARATORS = (re.compile(r",(?!0\d)"), re.compile(r",\s"))
_SIZED_BRACKET = re.compile(r"\\(?:left|right)(?![A-Za-z])\s*")
_TEXT_COMMAND = re.compile(r"\\(?:text|textbf|textit|textrm|textnormal|mathrm|mathbf|mbox)\s*\{([^{}]*)\}")
# a hyphen at the end belongs to an incomplete formula
_WORDS = re.compile(r"[A-Za-z](?:[A-Za-z '\-]*[A-Za-z '])?")


@functools.lru_cache(maxsize=_CACHE_SIZE)
def normalise(text: str) -> str:
    """The answer without markup: dollar signs, display delimiters, a final full stop, characters outside ASCII."""
    if text.isascii() and text.isdigit():
        return text.lstrip("0") or "0"
    plain = _strip_markup(text)
    return canonical_number(plain) or plain


def normalise_for(gold: str, text: str) -> str:
    """The normal form of a stated answer; "1,100" is two numbers in it if the normalised gold answer is a list."""
    answer = normalise(text)
    if "," in text and canonical_number(answer) is not None and _number_lists(gold)[1]:
        members = _strip_markup(text)
        # unless it is clear that the comma separates thousands
        if ",0" not in members and not any(mark in text for mark in _GROUP_MARKS):
            return members.replace(",", ", ")
    return answer


def _strip_markup(text: str) -> str:
    if not text.isascii():
        text = text.translate(_UNICODE)
        text = _UNICODE_ROOT.sub(lambda root: rf"\sqrt{{{root[1] or root[2]}}}", text)
    text = text.replace(r"\$", "").replace("$", "").replace(r"\!", "").replace("{,}", ",")
    text = _FINAL_STOP.sub("", _THIN_SPACE.sub(" ", text)).strip()
    for opening, closing in _WRAPPERS:
        if len(text) > len(opening) + len(closing) and text.startswith(opening) and text.endswith(closing):
            text = text[len(opening) : -len(closing)]
    text = _INNER_BOX.sub("", text).replace(r"\varnothing", r"\emptyset")
    text = _REPEATING.sub(_repeating_to_fraction, text)
    text = _BRACED.sub(r"\1", _FINAL_STOP.sub("", text)).strip()
    return _ZERO_FIRST.sub(r"\1, ", text)


def _repeating_to_fraction(match: re.Match[str]) -> str:
    whole, fixed, repeated = match.groups()
    # 0.1(6) = (16 - 1) / 90
    if len(fixed) + len(repeated) > 50:
        return match[0]
    numerator = int(whole + fixed + repeated) - int(whole + fixed)
    return rf"\frac{{{numerator}}}{{{'9' * len(repeated)}{'0' * len(fixed)}}}"


def canonical_number(text: str) -> str | None:
    """The shortest form of a plain integer or decimal ("-1,234.50" is "-1234.5"); None for anything else.

    It is a string, so that numbers of any length are compared exactly and cheaply.
    """
    match = _NUMBER.fullmatch(text)
    if match is None:
        return None
    sign, whole, decimals, bare_decimals, exponent = match.groups()
    whole = (whole or "").replace(",", "").replace(" ", "")
    decimals = decimals or bare_decimals or ""
    shift = int(exponent or 0)
    if shift > 0:
        decimals = decimals.ljust(shift, "0")
        whole, decimals = whole + decimals[:shift], decimals[shift:]
    elif shift < 0:
        whole = whole.rjust(-shift, "0")
        whole, decimals = whole[:shift], whole[shift:] + decimals
    whole, decimals = whole.lstrip("0") or "0", decimals.rstrip("0")
    magnitude = f"{whole}.{decimals}" if decimals else whole
    return f"-{magnitude}" if sign == "-" and magnitude != "0" else magnitude


def _squash(text: str) -> str:
    """The text without LaTeX markup that never changes its meaning, for comparing texts."""
    text = _SIZED_BRACKET.sub("", text).replace(r"\displaystyle", "")
    text = re.sub(r"\\[dtc]frac(?![A-Za-z])", r"\\frac", text)
    return re.sub(r"(?<!\w)\s+|\s+(?!\w)", "", text)


def words_of(text: str) -> str | None:
    r"""The words of an answer that is only words ("no solution", `\text{Monday}`); None for any other."""
    text = _TEXT_COMMAND.sub(r"\1", text).strip().rstrip(".")
    choice = re.fullmatch(r"\(([A-Z])\)", text)
    if choice:
        return choice[1]
    if not _WORDS.fullmatch(text):
        return None
    # a single letter is a choice or a variable, for which A and a differ
    return " ".join(text.split()).casefold() if len(text) > 1 else text


def _number_lists(text: str) -> tuple[str, list[list[str]]]:
    """The brackets around a list of numbers ("", "{}", "()", "[)", ...), and its readings as two or more numbers.

    "(1,234, 5)" may be 1, 234 and 5, or 1234 and 5. Other texts have no reading.
    """
    text = _SIZED_BRACKET.sub("", text).replace(r"\{", "{").replace(r"\}", "}")
    brackets = ""
    if text[:1] in _OPENING and text[-1:] in _CLOSING:
        brackets, text = text[0] + text[-1], text[1:-1]
    readings = []
    for separator in _SEPARATORS:
        members = [canonical_number(member.strip()) for member in separator.split(text)]
        numbers = [number for number in members if number is not None]
        if 2 <= len(numbers) == len(members) and numbers not in readings:
            readings.append(numbers)
    return brackets, readings


@functools.lru_cache(maxsize=_CACHE_SIZE)
def normalise_gold(answer: str) -> str:
    """The normal form of a gold answer; some data sets hold lists as strings: "['9.6\\n']"."""
    text = stated_gold(answer)
    inner = text[1:-1].strip()
    if text[:1] + text[-1:] == "[]" and "," not in inner and canonical_number(inner) is not None:
        text = inner  # with a comma it is an interval
    elif text[:1] + text[-1:] == "{}" and "," in inner and canonical_number(inner) is not None:
        text = inner.replace(",", ", ")  # a set of numbers, not one number with thousands separators
    return normalise(text)


def stated_gold(answer: str) -> str:
    """The content of a box that states a gold answer of the data set.

    It leaves out what no reply would state: the quotes of a list, and the text around a box.
    """
    text = answer.strip()
    listed = re.fullmatch(r"\[\s*(['\"])(.*)\1\s*\]", text, re.DOTALL)
    if listed:
        # not parsed as Python: some sets double the backslashes of LaTeX, others do not
        quote = listed[1]
        members = re.split(rf"{quote}\s*,\s*{quote}", listed[2].replace("\\\\", "\\"))
        text = ", ".join(member.removesuffix(r"\n").strip() for member in members)
    box = _find_boxes(text)
    return _join_last_boxes(text, box) if box else text


def judge_exactly(answer: str, gold: str) -> bool | None:
    """Whether a normalised answer is right; None if that needs algebra."""
    if answer == gold:
        return True
    if canonical_number(answer) is not None and canonical_number(gold) is not None:
        return False
    if _squash(answer) == _squash(gold):
        return True
    is_listed = _judge_lists(answer, gold)
    if is_listed is not None:
        return is_listed
    answer_words, gold_words = words_of(answer), words_of(gold)
    if answer_words is None or gold_words is None:
        return None
    if answer_words == gold_words:
        return True
    # a gold answer in \text is not a product of variables, so other words are wrong
    return False if _TEXT_COMMAND.search(gold) else None


def _judge_lists(answer: str, gold: str) -> bool | None:
    """Compares two lists of numbers: points and intervals are ordered, sets and bare lists are not."""
    (brackets, lists), (gold_brackets, gold_lists) = _number_lists(answer), _number_lists(gold)
    if not lists or not gold_lists:
        return None
    if {brackets, gold_brackets} <= {"", "{}"}:
        # otherwise they may still be equal within the algebra's tolerance
        return any(set(members) == set(gold) for members in lists for gold in gold_lists) or None
    return any(members in gold_lists for members in lists) if brackets == gold_brackets else None
