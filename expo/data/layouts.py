"""The columns in which published data sets keep their questions and answers.

The columns of a table's first row choose its layout, unless data.columns names them. Column names and pitfalls come
from the data sets' pages on the Hugging Face hub; `hub.NAMED` lists the sets. `values.py` reads the values.
"""

import itertools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from string import ascii_uppercase
from typing import Any, TypeVar

from expo.config import DataSection
from expo.data import values
from expo.data.questions import Row
from expo.errors import ConfigError
from expo.types import QuestionParts

Record = Mapping[str, Any]
Names = str | tuple[str, ...]  # one column, or one for each option
Columns = Mapping[Any, str | list[str] | None]  # data.columns: what a column holds, and its name

CONTEXTS = ("context", "passage", "body", "Body")  # SQuAD's kind; ASDiv and SVAMP: the story before the question
CHOICES = ("choices", "options")  # MMLU, ARC; MMLU-Pro, AQuA-RAT
# what a text model cannot be shown; such a column may be empty
_MEDIA = re.compile(r"(?:decoded_)?images?(?:_?\d+)?|audio|video", re.IGNORECASE)
T = TypeVar("T")
COLUMNS_HINT = "--data.columns='{question: COLUMN, answer: COLUMN}'"


@dataclass(frozen=True)
class Table:
    """Rows with the same columns.

    name: the file or set, for error messages; records: each with its row number; keeps_ids: whether the column `id` is
    the question's id, which otherwise is a hash of its text; unread: columns left out before the records were made.
    """

    name: str
    records: Iterable[tuple[int, Record]]
    keeps_ids: bool = False
    unread: tuple[str, ...] = ()


@dataclass(frozen=True)
class ReadOptions:
    """How the rows of a source are read.

    columns: data.columns; needs_columns: whether a table without these columns is refused, otherwise the known layouts
    are tried; skip_bad_answers: whether a row without a usable answer is left out and counted, otherwise it is refused.
    """

    columns: Columns = field(default_factory=dict)
    needs_columns: bool = True
    skip_bad_answers: bool = False

    @classmethod
    def of(cls, section: DataSection, *, needs_columns: bool = True) -> "ReadOptions":
        """Those of a configuration."""
        columns = {"choices" if holds == "options" else holds: name for holds, name in section.columns.items()}
        return cls(columns, needs_columns, section.skip_bad_answers)


DEFAULT_OPTIONS = ReadOptions()


@dataclass(frozen=True)
class Layout:
    """The columns of a table, None where it has no such column, and the function that reads the answer's value; choices
    may be a column for each.
    """

    question: str
    answer: str
    read_answer: Callable[[Any], values.Golds] = values.single_gold
    context: str | None = None
    choices: Names | None = None
    id: str | None = None
    level: str | None = None

    def columns(self) -> list[str]:
        """The columns that are read."""
        choices = self.choices if isinstance(self.choices, tuple) else (self.choices,)
        named = (self.question, self.answer, self.context, *choices, self.id, self.level)
        return [column for column in named if column is not None]


LAYOUTS = (
    Layout("prompt", "reward_model", values.ground_truth),  # DAPO-17K as published; verl's format
    Layout("prompt", "solution"),  # open-r1's copy of it: `solution` is the bare answer
    Layout("question", "final_answer"),  # OlympiadBench: a list
    Layout("question", "answer"),  # the format of expo; GSM8K, Minerva, AMC 2023, MMLU
    Layout("problem", "answer"),  # AIME, MATH-500; AMC of AIMO has 142.0 for 142
    Layout("Problem", "Answer"),  # Maxwell-Jia/AIME_2024
    Layout("Question", "Answer"),  # SVAMP
    Layout("question", "answerKey"),  # ARC, CommonsenseQA
    Layout("prompt", "answer"),
    Layout("prompt", "ground_truth", values.accepted_golds),
    Layout("problem", "solution", values.worked_gold),  # MATH
    Layout("question", "solution", values.worked_gold),
)
"""Tried in this order: a table with `final_answer` or `answer` may also have a `solution`, a worked one."""


def choose_layout(name: str, columns: Iterable[str], options: ReadOptions) -> Layout:
    """The layout that data.columns names, or the first known one whose columns are present.

    Raises: ConfigError, which names the columns, if no layout fits.
    """
    present, chosen = list(columns), options.columns
    named = itertools.chain.from_iterable(name if isinstance(name, list) else [name] for name in chosen.values())
    missing = [column for column in named if column is not None and column not in present]
    if missing and options.needs_columns:
        raise ConfigError(
            f"data.columns names {', '.join(missing)}, but {name} has the columns {', '.join(present) or '(none)'}"
        )
    if missing:
        chosen = {}
    layout = _mapped_layout(chosen) or next(
        (known for known in LAYOUTS if known.question in present and known.answer in present), None
    )
    if layout is None:
        known = ", ".join(f"{layout.question} + {layout.answer}" for layout in LAYOUTS)
        raise ConfigError(
            f"{name} has the columns {', '.join(present) or '(none)'}; expected one of: {known}; or name the columns: "
            f"{COLUMNS_HINT}"
        )
    used = layout.columns()

    def optional(kind: str, known: tuple[str, ...]) -> str | None:
        if kind in chosen:
            return _one(chosen[kind])
        return next((column for column in known if column in present and column not in used), None)

    given = chosen.get("choices")
    choices: Names | None = tuple(given) if isinstance(given, list) else optional("choices", CHOICES)
    if choices is None and "choices" not in chosen:
        letters = tuple(itertools.takewhile(lambda letter: letter in present and letter not in used, ascii_uppercase))
        choices = letters if len(letters) > 1 else None
    return replace(
        layout,
        context=optional("context", CONTEXTS),
        choices=choices,
        id=optional("id", ("id",)),
        level=optional("level", ("level",)),
    )


def _one(column: str | list[str] | None) -> str | None:
    assert not isinstance(column, list), "DataSection allows a list of columns for options alone"
    return column


def _mapped_layout(columns: Columns) -> Layout | None:
    """The layout that data.columns names; None if it names no question."""
    question = _one(columns.get("question"))
    if question is None:
        return None
    accepted = _one(columns.get("accepted"))
    if accepted is not None:
        return Layout(question, accepted, values.accepted_golds)
    return Layout(question, str(columns["answer"]), values.any_gold)


def columns_to_read(name: str, columns: Iterable[str], options: ReadOptions) -> list[str]:
    """The columns of a table that `TableReader` uses.

    Raises: ConfigError, which names the columns, if no layout fits.
    """
    present = list(columns)
    layout = choose_layout(name, present, options)
    read = set(layout.columns())
    return [column for column in present if column in read or _MEDIA.fullmatch(column)]


class TableReader:
    """Reads the rows of tables, and remembers the columns that it did not read."""

    def __init__(self, options: ReadOptions) -> None:
        self._options = options
        self.unread: dict[str, None] = {}  # an ordered set

    def rows(self, table: Table) -> Iterator[Row]:
        """The rows of a table; with skip_bad_answers, a row without a usable answer has the answer "".

        Raises: ConfigError if no layout fits its first record, or if a record, which it names, has no question or
            answer, or a picture.
        """
        self.unread.update(dict.fromkeys(table.unread))
        layout = None
        for number, record in table.records:
            layout = layout or choose_layout(f"{table.name}:{number}", record, self._options)
            if len(record) > 2:
                self._note_unread(f"{table.name}:{number}", record, layout)
            yield self._row(table, number, record, layout)

    def _note_unread(self, where: str, record: Record, layout: Layout) -> None:
        read = layout.columns()
        for column, value in record.items():
            if column in read or value in (None, "", [], {}):
                continue
            if _MEDIA.fullmatch(column):
                raise ConfigError(
                    f"{where} has `{column}`, which a text model cannot be shown; leave out the rows that need it, or "
                    f"remove the column"
                )
            self.unread.setdefault(column)

    def _row(self, table: Table, number: int, record: Record, layout: Layout) -> Row:
        where = f"{table.name}:{number}"
        system, question = values.read_question(record.get(layout.question))
        if not question:
            raise _unusable(where, layout.question, record, "correct or drop it")
        context = _read(where, "context", layout.context, record, values.context_text) if layout.context else ""
        value = record.get(layout.answer)
        golds = stated = layout.read_answer(value)
        choices = _read(where, "options", layout.choices, record, values.Choices.read) if layout.choices else None
        if choices is not None:
            golds = choices.golds(value, stated)
        if not golds and not self._options.skip_bad_answers:
            of_options = "it is none of the options; " if stated else ""
            advice = f"{of_options}correct or drop it, or set --data.skip_bad_answers=true"
            raise _unusable(where, layout.answer, record, advice)
        options = choices.options if choices else ()
        parts = QuestionParts(question, context, options) if context or options else None
        given_id = record.get(layout.id) if table.keeps_ids and layout.id else None
        level = record.get(layout.level) if layout.level else None
        return Row(
            where,
            parts.text() if parts else question,
            golds[0] if golds else "",
            None if given_id is None else str(given_id),
            "" if level is None else str(level),
            golds[1:],
            system,
            parts,
        )


def _read(where: str, holds: str, names: Names, record: Record, read: Callable[[Any], T]) -> T:
    """What a column holds, or several columns, one for each option. Raises: ConfigError if `read` refuses it."""
    if isinstance(names, tuple):
        value: Any = {ascii_uppercase[index]: record.get(name) for index, name in enumerate(names)}
    else:
        value = record.get(names)
    try:
        return read(value)
    except ValueError as error:
        column = names if isinstance(names, str) else ", ".join(names)
        raise ConfigError(
            f"{where} has no usable {holds} in `{column}`: {str(value)[:80]!r}; {error}; correct it, or leave it out: "
            f"--data.columns='{{{holds}: null}}'"
        ) from error


def _unusable(where: str, column: str, record: Record, advice: str) -> ConfigError:
    return ConfigError(f"{where} has no usable `{column}`: {str(record.get(column))[:80]!r}; {advice}")
