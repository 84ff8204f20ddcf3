r"""The methods that give verdicts, by the names of `reward.verifier`.

A method reads the answer that a reply states, and decides what it can in the trainer's process; the rest goes to the
worker processes, where `worker.py` has the counterpart of each name:

- "math": mathematics, as `docs/verifier.md` says.
- "exact": the stated answer, without dressing and white space, equals the gold answer's text.
- "choice": the stated letter of a choice equals the gold letter.
- "reasoning-gym": the scorer of the question's family if the gold answer is an entry (`families.py`), else "math".
- "module:function": your own function(reply, answer), which returns True, False, or a verdict's name.
"""

import re
from dataclasses import dataclass
from typing import Final, Protocol

from expo.rewards.answers import is_missing, normalise_gold, stated_gold
from expo.rewards.extract import MAX_ANSWER_CHARS, READS, THINK_TAGS, after_thinking, extract_answer, why_unparsed
from expo.rewards.families import is_entry, own_answer
from expo.rewards.maths.compare import Outcome, RationalAlgebra, is_opaque, judge
from expo.rewards.maths.dressing import undress

BUILT_IN: Final = ("math", "exact", "choice", "reasoning-gym")
_CHOICE = re.compile(r"\\text\{([^{}]*)\}")
_LETTER = re.compile(
    r"\(?([A-Za-z])\)?(?:[.):]?\s.*|[.):])?|(?:option|choice)\s*\(?([A-Za-z])\)?", re.IGNORECASE | re.DOTALL
)


@dataclass(frozen=True)
class Reading:
    """How replies are read.

    think_tags: pairs of an opening and a closing tag around thinking, which is never read; is_thinking: whether the
    prompts end with an opening tag, so that a reply starts inside its thinking.
    """

    think_tags: tuple[tuple[str, str], ...] = THINK_TAGS
    is_thinking: bool = False

    def answer(self, reply: str) -> str | None:
        """The answer that a reply states; None if it states none."""
        return extract_answer(reply, self.think_tags, is_thinking=self.is_thinking)

    def why_unparsed(self, reply: str) -> str | None:
        """Why a reply states no answer, in a few words; None if it states one."""
        return why_unparsed(reply, self.think_tags, is_thinking=self.is_thinking)

    def text(self, reply: str) -> str | None:
        """The reply without its thinking; None if it ends inside its thinking."""
        return after_thinking(reply, self.think_tags, is_thinking=self.is_thinking)


class Method(Protocol):
    """What gives verdicts; all texts of one pair are strings, so that a pair can be cached and sent to a worker."""

    def read(self, reply: str, reading: Reading) -> str | None:
        """What is graded of a reply; None if it states no answer."""

    def pair(self, stated: str, gold: str) -> tuple[str, str]:
        """Stated and gold answer in the form that is compared."""

    def decide(self, stated: str, gold: str) -> Outcome:
        """The outcome for a pair; UNKNOWN sends it to a worker."""

    def statement(self, gold: str) -> str | None:
        """A reply that states a gold answer; None if the gold answer cannot be graded against."""

    def needs_check(self, gold: str) -> bool:
        """Whether only a worker can tell that a gold answer, as `pair` has it, is gradable."""


class MathMethod:
    """Mathematics; computer algebra in the workers."""

    def read(self, reply: str, reading: Reading) -> str | None:
        """The answer as stated."""
        return reading.answer(reply)

    def pair(self, stated: str, gold: str) -> tuple[str, str]:
        """Both without dressing."""
        return undress(stated), normalise_gold(gold)

    def decide(self, stated: str, gold: str) -> Outcome:
        """By rational arithmetic."""
        try:
            return judge(stated, gold, RationalAlgebra())
        except (ArithmeticError, ValueError, RecursionError):  # a worker survives what it meets
            return Outcome.UNKNOWN

    def statement(self, gold: str) -> str | None:
        """The gold answer in a box, as given: a normal form that lost information would equal itself.

        None also if it is longer than the answers that are read.
        """
        stated = stated_gold(gold)
        if len(stated) > MAX_ANSWER_CHARS or is_missing(normalise_gold(gold)):
            return None
        return rf"\boxed{{{stated}}}"

    def needs_check(self, gold: str) -> bool:
        """Whether it is in no grammar but math-verify's."""
        return is_opaque(gold)


class ExactMethod(MathMethod):
    """Equality of texts."""

    def decide(self, stated: str, gold: str) -> Outcome:
        """Without white space."""
        return Outcome.CORRECT if "".join(stated.split()) == "".join(gold.split()) else Outcome.WRONG

    def needs_check(self, gold: str) -> bool:  # noqa: ARG002
        """No: any text will do."""
        return False


class ChoiceMethod(ExactMethod):
    """Equality of letters."""

    def pair(self, stated: str, gold: str) -> tuple[str, str]:
        """Both letters; "" where there is none."""
        return _letter(stated), _letter(stated_gold(gold))

    def statement(self, gold: str) -> str | None:
        """The letter in a box."""
        letter = _letter(stated_gold(gold))
        return rf"\boxed{{{letter}}}" if letter else None


class ReasoningGymMethod(MathMethod):
    """The scorer of a question's family, in the workers; mathematics for gold answers that are no entries."""

    def pair(self, stated: str, gold: str) -> tuple[str, str]:
        """Both as given, if the gold answer is an entry."""
        return (stated.strip(), gold) if is_entry(gold) else super().pair(stated, gold)

    def decide(self, stated: str, gold: str) -> Outcome:
        """By a worker, if the gold answer is an entry."""
        return Outcome.UNKNOWN if is_entry(gold) else super().decide(stated, gold)

    def statement(self, gold: str) -> str | None:
        """The entry's own answer in a box; nothing that is read if it is one of many."""
        if not is_entry(gold):
            return super().statement(gold)
        answer = own_answer(gold)
        return "" if answer is None else rf"\boxed{{{answer}}}"

    def needs_check(self, gold: str) -> bool:
        """Not for entries: stating one shows that it can be scored."""
        return not is_entry(gold) and super().needs_check(gold)


class OwnMethod:
    """A function of the user, in the workers."""

    def read(self, reply: str, reading: Reading) -> str | None:
        """The reply without its thinking."""
        return reading.text(reply)

    def pair(self, stated: str, gold: str) -> tuple[str, str]:
        """Both as given."""
        return stated, gold

    def decide(self, stated: str, gold: str) -> Outcome:  # noqa: ARG002
        """By a worker."""
        return Outcome.UNKNOWN

    def statement(self, gold: str) -> str | None:  # noqa: ARG002
        """Nothing that is read: only the function knows what states its gold answers."""
        return ""

    def needs_check(self, gold: str) -> bool:  # noqa: ARG002
        """No."""
        return False


def what_is_read(name: str) -> str:
    """What a verifier reads of a reply, and what it compares it with, in one line."""
    compared = {
        "math": "as mathematics",
        "exact": "as a text without white space",
        "choice": "as the letter of a choice",
        "reasoning-gym": "by the scorer of the question's family, or as mathematics",
    }
    if name in compared:
        return f"{READS}; it is compared {compared[name]}"
    return f"the reply after its thinking, which {name} gets whole"


def find_method(name: str) -> Method:
    """The method of that name. Raises: ValueError if it is neither built in nor "module:function"."""
    built_in: dict[str, type[Method]] = {
        "math": MathMethod,
        "exact": ExactMethod,
        "choice": ChoiceMethod,
        "reasoning-gym": ReasoningGymMethod,
    }
    if name in built_in:
        return built_in[name]()
    if re.fullmatch(r"[\w.]+:\w+", name):
        return OwnMethod()
    raise ValueError(f"verifier {name!r} is unknown; give one of {', '.join(BUILT_IN)}, or module:function")


def _letter(text: str) -> str:
    match = _LETTER.fullmatch(_CHOICE.sub(r"\1", undress(text)).strip())
    return (match[1] or match[2]).upper() if match else ""
