"""The values on the way from a question to the gradient."""

from collections.abc import Container, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

VerdictKind = Literal["correct", "wrong", "unparsed", "timeout"]


@dataclass(frozen=True)
class QuestionParts:
    """What the text of a question is made of; the variables of data.template.

    question: without context and options; context: the text before it, or ""; options: label and text of each choice;
    choices that are one text have the label "".
    """

    question: str
    context: str = ""
    options: tuple[tuple[str, str], ...] = ()

    def text(self, without: Container[str] = ()) -> str:
        """Context, question and options as one text, but for the parts that `without` names."""
        context = f"{self.context}\n\n" if self.context and "context" not in without else ""
        options = f"\n{shown_options(self.options)}" if self.options and "options" not in without else ""
        return f"{context}{self.question}{options}"


def shown_options(options: Iterable[tuple[str, str]]) -> str:
    """The choices of a question, each as "(A) text" in a line of its own."""
    return "\n".join(f"({label}) {text}" if label else text for label, text in options)


@dataclass(frozen=True)
class Question:
    """A question with a checkable answer.

    id: stable, unique in its set; text: its wording; answer: the gold answer; level: name of its difficulty, or "";
    alternatives: further gold answers, any of which is right too; system: the system message of its prompt, or "";
    parts: what the text is made of, None if it is one part.
    """

    id: str
    text: str
    answer: str
    level: str = ""
    alternatives: tuple[str, ...] = ()
    system: str = ""
    parts: QuestionParts | None = None

    @property
    def golds(self) -> tuple[str, ...]:
        """Every gold answer; a reply that states one of them is correct."""
        return (self.answer, *self.alternatives)


@dataclass(frozen=True)
class Prompt:
    """A question and the token ids of its prompt."""

    question: Question
    prompt_ids: list[int]


@dataclass(frozen=True)
class Reply:
    """One sampled reply.

    token_ids: its tokens, with the end-of-sequence token if it has one; logps: their log-probabilities in nats at the
    sampling temperature; is_truncated: whether max_new_tokens ended it; text: decoded without special tokens.
    """

    token_ids: list[int]
    logps: list[float]
    is_truncated: bool
    text: str


@dataclass(frozen=True)
class Verdict:
    """The result of grading one reply.

    kind: "correct"; "wrong"; "unparsed" if the reply states no answer; "timeout" if its answer could not be graded
    within the limits on time and memory. answer: the answer as the reply states it, None if unparsed. is_unevaluated:
    whether it has the right value, but is an operation still to be computed (`12 \\times 12` for 144).
    """

    kind: VerdictKind
    answer: str | None
    is_unevaluated: bool = False

    @property
    def reward(self) -> float:
        """1 for a correct reply, 0 for any other."""
        return 1.0 if self.kind == "correct" else 0.0


@dataclass(frozen=True)
class Sample:
    """One reply as a training sample.

    prompt_ids, reply_ids: token ids; rollout_logps: log-probabilities of reply_ids under the rollout engine, nats;
    advantage: of the reply; is_left_out: whether loss and denominators exclude it (it still counts when samples are
    split into mini-batches).
    """

    prompt_ids: Sequence[int]
    reply_ids: Sequence[int]
    rollout_logps: Sequence[float]
    advantage: float
    is_left_out: bool = False

    def __len__(self) -> int:
        return len(self.prompt_ids) + len(self.reply_ids)
