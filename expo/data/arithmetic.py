"""One-digit sums and differences, for a real language model that is too small for word problems.

A question contains a worked example, which shows a base model the form of an answer. It is a complete prompt
(data.prompt: plain, data.chat_template: false). The question of 2 + 6 is:

    Question: What is 3 + 4?
    Answer: 3 + 4 = 7

    Question: What is 2 + 6?
"""

from expo.ledger import LedgerQuestion
from expo.ledger.questions import is_held_out

EXAMPLE = (3, 4)


def train_questions() -> list[LedgerQuestion]:
    """The questions that are not held out, in a fixed order."""
    return [question for question in _all_questions() if not is_held_out(question.question)]


def held_out_questions() -> list[LedgerQuestion]:
    """The held-out questions, about one in four; a hash of the text decides."""
    return [question for question in _all_questions() if is_held_out(question.question)]


def _all_questions() -> list[LedgerQuestion]:
    digits = range(10)
    pairs = [(a, b) for a in digits for b in digits if (a, b) != EXAMPLE]
    sums = [LedgerQuestion(_question_text(f"{a} + {b}"), str(a + b), "sums") for a, b in pairs]
    return sums + [LedgerQuestion(_question_text(f"{a} - {b}"), str(a - b), "differences") for a, b in pairs if a >= b]


def _question_text(term: str) -> str:
    example = f"{EXAMPLE[0]} + {EXAMPLE[1]}"
    return f"Question: What is {example}?\nAnswer: {example} = {sum(EXAMPLE)}\n\nQuestion: What is {term}?\n"
