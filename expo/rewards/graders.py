"""What the worker processes grade with, by the names of `reward.verifier`; `methods.py` is their other half."""

import functools
import importlib
from collections.abc import Callable
from typing import Any, Final

from expo.rewards import families, messages
from expo.rewards.maths.compare import Outcome, judge

Grader = Callable[[str | None, str], bytes]
"""Called with the stated answer, None to check the gold answer only, and the gold answer; returns a message."""

# The grammars fill their tables lazily: up to 0.1 s for the first use of each construction.
_WARM_UP: Final = (
    (r"\sum_{k=1}^{3} k", "x+1"),
    (r"\int_0^1 x\,dx", r"\frac{\partial y}{\partial x}"),
    (r"\lim_{x \to 0} \frac{\sin x}{x}", r"2^{10} \mod 5"),
    (r"\sin^2 x + \sqrt{x}", r"1-\cos^2 x + \sqrt{x}"),
    (r"\log_2 3", r"\frac{\ln 3}{\ln 2}"),
    (r"\cos\frac{\pi}{7}", r"e^{2}+\sqrt{2+\sqrt{3}}"),
)
_OUTCOMES: Final = {
    Outcome.WRONG: messages.WRONG,
    Outcome.UNEVALUATED: messages.UNEVALUATED,
    Outcome.CORRECT: messages.CORRECT,
}
_KINDS: Final = {
    "correct": messages.CORRECT,
    "wrong": messages.WRONG,
    "unparsed": messages.UNPARSED,
    "timeout": messages.TIMEOUT,
}


def load_grader(method: str) -> Grader:
    """The grader of a method, with its libraries imported and warm.

    Raises: ImportError or AttributeError if a library, or the function of "module:function", is missing.
    """
    if method == "reasoning-gym":
        families.load_library()
        return functools.partial(_grade_by_score, _mathematics())
    if ":" in method:
        module, _, name = method.partition(":")
        return functools.partial(_grade_by_function, getattr(importlib.import_module(module), name))
    grader = _mathematics()
    for answer, gold in _WARM_UP:
        for pair in ((None, answer), (None, gold), (answer, gold)):
            grader(*pair)
    return grader


def _mathematics() -> Grader:
    from expo.rewards.maths.algebra import BadGoldError, SympyAlgebra, parse_latex

    algebra = SympyAlgebra()

    def grade(answer: str | None, gold: str) -> bytes:
        try:
            if answer is None:
                parse_latex(gold)
                return messages.CORRECT
            return _OUTCOMES[judge(answer, gold, algebra)]
        except MemoryError:
            raise
        except BadGoldError:
            return messages.BAD_GOLD
        except Exception:  # the grammar and the algebra raise many unrelated types
            # no formula, or one that cannot be compared with the gold answer
            return messages.BAD_GOLD if answer is None else messages.WRONG

    return grade


def _grade_by_score(mathematics: Grader, answer: str | None, gold: str) -> bytes:
    if not families.is_entry(gold):
        return mathematics(answer, gold)
    try:
        score = families.score(answer or "", gold)
    except MemoryError:
        raise
    except Exception:  # a family's scorer may raise anything over an answer of another form
        return messages.WRONG
    return messages.CORRECT if score >= 1.0 else messages.WRONG


def _grade_by_function(function: Callable[[str, str], Any], answer: str | None, gold: str) -> bytes:
    try:
        verdict = function(answer or "", gold)
    except MemoryError:
        raise
    except BaseException as error:  # a user's function may raise anything, and may call sys.exit
        return messages.ERROR + f"raised {type(error).__name__}: {error}".encode("utf-8", "replace")
    if verdict is True or verdict is False:
        return messages.CORRECT if verdict else messages.WRONG
    if verdict in _KINDS:
        return _KINDS[verdict]
    return messages.ERROR + f"returned {verdict!r:.100}; return True, False or one of {', '.join(_KINDS)}".encode()
