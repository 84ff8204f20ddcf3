"""Sets of distinct questions.

The curriculum keeps one pass rate per question, so a file must not count a question twice (DAPO-17K's file has about a
hundred rows for each): rows with the same text become one question, and the duplicates are counted.
"""

import hashlib
import unicodedata
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property

from expo.errors import ConfigError
from expo.rewards.answers import normalise_gold
from expo.types import Question, QuestionParts

NUM_EXAMPLES = 5  # ids named in a note


@dataclass(frozen=True)
class QuestionSet:
    """The distinct questions of one source, counts of what was left out, and notes about it."""

    source: str
    questions: tuple[Question, ...]
    num_duplicates: int = 0
    """Rows with the text of another row."""
    fewest_rows: int = 1
    """Rows of the question with the fewest rows; above 1, the file repeats every question."""
    num_conflicts: int = 0
    """Questions left out because their rows disagree on the answer."""
    num_bad_answers: int = 0
    """Questions left out because their gold answer cannot be graded, and rows without an answer."""
    num_overlapping: int = 0
    """Training questions left out because an evaluation set contains them."""
    unread_columns: tuple[str, ...] = ()
    """Columns of the source that hold something and are not used."""
    notes: tuple[str, ...] = ()
    """Messages for the user, one line each."""

    @property
    def num_rows(self) -> int:
        """Rows of the source, including those left out."""
        left_out = self.num_conflicts + self.num_bad_answers + self.num_overlapping
        return len(self.questions) + left_out + self.num_duplicates

    @cached_property
    def digest(self) -> str:
        """SHA-256 over all ids, texts and answers in order; equal for equal sets from different sources."""
        hashed = hashlib.sha256()
        for question in self.questions:
            parts = (question.id, question.text, question.answer)
            # only where there are some, so that other sets keep the digest that earlier runs recorded
            more = (question.alternatives, question.system) if question.alternatives or question.system else ()
            hashed.update(repr(parts + more).encode())
        return hashed.hexdigest()


@dataclass(frozen=True)
class Row:
    """One row of a source.

    where: file or set and row number, for error messages; answer: "" if it has none that can be used; alternatives,
    system: as of a `Question`.
    """

    where: str
    text: str
    answer: str
    given_id: str | None = None
    level: str = ""
    alternatives: tuple[str, ...] = ()
    system: str = ""
    parts: QuestionParts | None = None


@dataclass
class _Merger:
    source: str
    num_rows: int = 0
    questions: dict[str, Question] = field(default_factory=dict)  # by normalised text
    num_rows_of: Counter[str] = field(default_factory=Counter)  # by normalised text
    normal_texts: dict[str, str] = field(default_factory=dict)  # cache by original text, which mostly repeats exactly
    texts_of_ids: dict[str, str] = field(default_factory=dict)
    conflicts: dict[str, None] = field(default_factory=dict)  # normalised texts, as an ordered set
    without_answer: list[str] = field(default_factory=list)  # where these rows are

    def add(self, row: Row) -> None:
        if not row.answer:
            self.without_answer.append(row.where)
            return
        self.num_rows += 1
        normal = self.normal_texts.get(row.text)
        if normal is None:
            normal = self.normal_texts[row.text] = normal_text(row.text)
        self.num_rows_of[normal] += 1
        key = row.given_id or (self.questions[normal].id if normal in self.questions else _digest(normal))
        if self.texts_of_ids.setdefault(key, normal) != normal:
            raise ConfigError(f"{row.where}: the id {key} belongs to another question already; make ids unique")
        question = Question(key, row.text, row.answer, row.level, row.alternatives, row.system, row.parts)
        seen = self.questions.setdefault(normal, question)
        if seen.golds != question.golds and _normal_golds(seen) != _normal_golds(question):
            self.conflicts[normal] = None


def _normal_golds(question: Question) -> set[str]:
    return {normalise_gold(gold) for gold in question.golds}


def merge_rows(source: str, rows: Iterable[Row]) -> QuestionSet:
    """The distinct questions of some rows, without those whose rows have different answers.

    Raises: ConfigError if no question is left, or two texts have the same id.
    """
    merger = _Merger(source)
    for row in rows:
        merger.add(row)
    questions = tuple(question for text, question in merger.questions.items() if text not in merger.conflicts)
    if not questions and merger.conflicts:
        raise ConfigError(
            f"every question of {source} comes with different answers, none of which can be trusted: "
            f"{_conflicting(merger)}; give each question one answer"
        )
    if not questions and merger.without_answer:
        raise ConfigError(f"no row of {source} has a usable answer; give another source")
    if not questions:
        raise ConfigError(f"{source} holds no questions; give a source that has some")
    num_distinct = len(merger.questions)
    return QuestionSet(
        source,
        questions,
        num_duplicates=merger.num_rows - num_distinct,
        fewest_rows=min(merger.num_rows_of.values()),
        num_conflicts=len(merger.conflicts),
        num_bad_answers=len(merger.without_answer),
        notes=(*_repeats_note(merger.num_rows, num_distinct), *_conflicts_note(merger), *_no_answer_note(merger)),
    )


def _repeats_note(num_rows: int, num_distinct: int) -> list[str]:
    if num_rows < 2 * num_distinct:
        return []
    times = "" if num_rows % num_distinct else f", each {num_rows // num_distinct} times"
    return [
        f"{num_rows:,} rows hold {num_distinct:,} questions{times}; each is kept once, so an epoch and a mean over "
        "samples are of questions, not of rows"
    ]


def _conflicts_note(merger: _Merger) -> list[str]:
    if not merger.conflicts:
        return []
    count = len(merger.conflicts)
    return [f"{count:,} questions come with different answers and are left out: {_conflicting(merger)}"]


def _no_answer_note(merger: _Merger) -> list[str]:
    if not merger.without_answer:
        return []
    count = len(merger.without_answer)
    return [f"{count:,} rows without a usable answer are left out: {name_some(merger.without_answer)}"]


def _conflicting(merger: _Merger) -> str:
    return name_some([merger.questions[text].id for text in merger.conflicts])


def name_some(ids: list[str]) -> str:
    """The first NUM_EXAMPLES ids, joined by commas."""
    return ", ".join(ids[:NUM_EXAMPLES]) + (", ..." if len(ids) > NUM_EXAMPLES else "")


def normal_text(text: str) -> str:
    """The text by which questions are distinguished: Unicode NFC, with each run of white space as one blank."""
    return " ".join(unicodedata.normalize("NFC", text).split())


def question_id(text: str) -> str:
    """The id of a question: 16 hexadecimal digits, a hash of its normalised text."""
    return _digest(normal_text(text))


def _digest(normal: str) -> str:
    return hashlib.sha256(normal.encode()).hexdigest()[:16]
