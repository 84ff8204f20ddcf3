"""One-digit sums and differences, for a real language model that is too small for word problems.

A question shows one worked example and then asks, so that a model that only goes on writing sees the form of an answer;
to be asked as it stands (data.prompt: plain, data.chat_template: false). That of 2 + 6:

    Question: What is 3 + 4?
    Answer: 3 + 4 = 7

    Question: What is 2 + 6?
"""

from expo.ledger import LedgerQuestion
from expo.ledger.questions import is_held_out

EXAMPLE = (3, 4)


def train_questions() -> list[LedgerQuestion]:
    """The questions that are not held out, always the same, in a fixed order."""
    return [asked for asked in _all_questions() if not is_held_out(asked.question)]


def held_out_questions() -> list[LedgerQuestion]:
    """The questions that are held out, about one in four, decided by a hash of the text."""
    return [asked for asked in _all_questions() if is_held_out(asked.question)]


def _all_questions() -> list[LedgerQuestion]:
    digits = range(10)
    pairs = [(a, b) for a in digits for b in digits if (a, b) != EXAMPLE]
    sums = [LedgerQuestion(_ask(f"{a} + {b}"), str(a + b), "sums") for a, b in pairs]
    return sums + [LedgerQuestion(_ask(f"{a} - {b}"), str(a - b), "differences") for a, b in pairs if a >= b]


def _ask(term: str) -> str:
    example = f"{EXAMPLE[0]} + {EXAMPLE[1]}"
    return f"Question: What is {example}?\nAnswer: {example} = {sum(EXAMPLE)}\n\nQuestion: What is {term}?\n"
