"""Questions, each held once.

The curriculum keeps one pass rate per question, so a file that repeats its questions (DAPO-17K's holds each about a
hundred times) would be learnt wrongly: rows of one text become one question, and the rest are counted.
"""

import hashlib
import unicodedata
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property

from expo.errors import ConfigError
from expo.rewards.answers import normalise_gold
from expo.types import Question

NUM_EXAMPLES = 5  # ids named in a note


@dataclass(frozen=True)
class QuestionSet:
    """Distinct questions of one source, how many rows were left out, and what is worth saying about that."""

    source: str
    questions: tuple[Question, ...]
    num_duplicates: int = 0
    """Rows that repeat another's text."""
    fewest_rows: int = 1
    """Of the question with the fewest rows; above 1 the file repeats itself."""
    num_conflicts: int = 0
    """Questions left out because their rows disagree on the answer."""
    num_bad_answers: int = 0
    """Questions left out because their gold answer cannot be graded."""
    num_overlapping: int = 0
    """Training questions left out because an evaluation set holds them."""
    notes: tuple[str, ...] = ()
    """One line each."""

    @property
    def num_rows(self) -> int:
        """Rows of the source, those left out included."""
        left_out = self.num_conflicts + self.num_bad_answers + self.num_overlapping
        return len(self.questions) + left_out + self.num_duplicates

    @cached_property
    def digest(self) -> str:
        """SHA-256 over every question and answer, in order: equal for equal sets, wherever they came from."""
        hashed = hashlib.sha256()
        for question in self.questions:
            hashed.update(repr((question.id, question.text, question.answer)).encode())
        return hashed.hexdigest()


@dataclass(frozen=True)
class Row:
    """One row of a source, as its layout reads it."""

    where: str
    text: str
    answer: str
    given_id: str | None = None
    level: str = ""


@dataclass
class _Merger:
    source: str
    num_rows: int = 0
    questions: dict[str, Question] = field(default_factory=dict)  # by normal text
    rows_of: Counter[str] = field(default_factory=Counter)  # by normal text
    normal_texts: dict[str, str] = field(default_factory=dict)  # by text as written, which mostly repeats exactly
    texts_of_ids: dict[str, str] = field(default_factory=dict)
    conflicts: dict[str, None] = field(default_factory=dict)  # normal texts, a set that keeps its order

    def add(self, row: Row) -> None:
        self.num_rows += 1
        normal = self.normal_texts.get(row.text)
        if normal is None:
            normal = self.normal_texts[row.text] = normal_text(row.text)
        self.rows_of[normal] += 1
        key = row.given_id or (self.questions[normal].id if normal in self.questions else _digest(normal))
        if self.texts_of_ids.setdefault(key, normal) != normal:
            raise ConfigError(f"{row.where}: the id {key} belongs to another question already; make ids unique")
        seen = self.questions.setdefault(normal, Question(key, row.text, row.answer, row.level))
        if seen.answer != row.answer and normalise_gold(seen.answer) != normalise_gold(row.answer):
            self.conflicts[normal] = None


def merge_rows(source: str, rows: Iterable[Row]) -> QuestionSet:
    """The distinct questions among some rows; those whose rows disagree on the answer are left out.

    Raises: ConfigError if no question is left, or one id stands for two texts.
    """
    merger = _Merger(source)
    for row in rows:
        merger.add(row)
    kept = tuple(question for text, question in merger.questions.items() if text not in merger.conflicts)
    if not kept and merger.conflicts:
        raise ConfigError(
            f"every question of {source} comes with different answers, none of which can be trusted: "
            f"{_conflicting(merger)}; give each question one answer"
        )
    if not kept:
        raise ConfigError(f"{source} holds no questions; give a source that has some")
    num_distinct = len(merger.questions)
    return QuestionSet(
        source,
        kept,
        num_duplicates=merger.num_rows - num_distinct,
        fewest_rows=min(merger.rows_of.values()),
        num_conflicts=len(merger.conflicts),
        notes=(*_repeats_note(merger.num_rows, num_distinct), *_conflicts_note(merger)),
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


def _conflicting(merger: _Merger) -> str:
    return name_some([merger.questions[text].id for text in merger.conflicts])


def name_some(ids: list[str]) -> str:
    """The first few of some ids."""
    return ", ".join(ids[:NUM_EXAMPLES]) + (", ..." if len(ids) > NUM_EXAMPLES else "")


def normal_text(text: str) -> str:
    """The text that tells questions apart: in Unicode's composed form, white space made single blanks."""
    return " ".join(unicodedata.normalize("NFC", text).split())


def question_id(text: str) -> str:
    """16 hexadecimal digits that depend on the normal text alone."""
    return _digest(normal_text(text))


def _digest(normal: str) -> str:
    return hashlib.sha256(normal.encode()).hexdigest()[:16]
