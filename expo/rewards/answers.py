r"""Normal forms of stated and gold answers, the texts that grading, voting and data checks have in common."""

import functools
import re
from typing import Final

from expo.rewards.extract import boxed_answer, extract_answer, has_box
from expo.rewards.maths.compare import Outcome, RationalAlgebra, judge
from expo.rewards.maths.dressing import CACHE_SIZE, undress

__all__ = [
    "canonical_number",
    "extract_answer",
    "has_box",
    "is_missing",
    "judge_exactly",
    "normalise",
    "normalise_gold",
    "stated_gold",
]

_NUMBER = re.compile(r"([+-]?)\s?(?:(\d+)(?:\.(\d*))?|\.(\d+))(?:[eE]([+-]?\d{1,3}))?", re.ASCII)
_LISTED = re.compile(r"\[\s*(['\"])(.*)\1\s*\]", re.DOTALL)
# What data sets write where there is no answer; "none" may be one.
_MISSING: Final = frozenset(
    {"proof", "see proof", "notfound", "not found", "nan", "null", "empty", "n/a", "no answer", "answer not found"}
)


def normalise(text: str) -> str:
    """The answer without dressing; the shortest form of a plain number."""
    plain = undress(text)
    return canonical_number(plain) or plain


def canonical_number(text: str) -> str | None:
    """The shortest form of a plain integer or decimal ("-1234.50" is "-1234.5"); None for anything else.

    It is a string, so that numbers of any length are compared exactly and cheaply.
    """
    match = _NUMBER.fullmatch(text)
    if match is None:
        return None
    sign, whole, decimals, bare_decimals, exponent = match.groups()
    whole, decimals = whole or "", decimals or bare_decimals or ""
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


@functools.lru_cache(maxsize=CACHE_SIZE)
def normalise_gold(answer: str) -> str:
    """The normal form of a gold answer; some data sets hold lists as strings: "['9.6\\n']"."""
    return normalise(stated_gold(answer))


def stated_gold(answer: str) -> str:
    """The content of a box that states a gold answer of the data set.

    It leaves out what no reply would state: the quotes of a list, and the text around a box.
    """
    text = answer.strip()
    listed = _LISTED.fullmatch(text)
    if listed:
        # not parsed as Python: some sets double the backslashes of LaTeX, others do not
        quote = listed[1]
        members = re.split(rf"{quote}\s*,\s*{quote}", listed[2].replace("\\\\", "\\"))
        text = ", ".join(member.removesuffix(r"\n").strip() for member in members)
    return boxed_answer(text) or text


def is_missing(gold: str) -> bool:
    """Whether a normalised gold answer says that there is none."""
    return not gold or re.sub(r"\\text|[{}]", "", gold).strip().casefold() in _MISSING


def judge_exactly(answer: str, gold: str) -> bool | None:
    """Whether two normalised answers are equal; None if that needs algebra."""
    outcome = judge(answer, gold, RationalAlgebra())
    return None if outcome == Outcome.UNKNOWN else outcome >= Outcome.UNEVALUATED
