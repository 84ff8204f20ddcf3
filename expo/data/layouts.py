"""The columns in which published data sets keep their questions and answers.

The columns of a table's first row choose its layout. Column names and pitfalls come from the data sets' pages on the
Hugging Face hub; `hub.NAMED` lists the sets.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from expo.data.prompts import PROMPTS
from expo.data.questions import Row
from expo.errors import ConfigError
from expo.rewards.answers import normalise_gold

Record = Mapping[str, Any]


@dataclass(frozen=True)
class Table:
    """Rows with the same columns; name: the file or set, for error messages; records: each with its row number."""

    name: str
    records: Iterable[tuple[int, Record]]
    keeps_ids: bool = False
    """Whether the column `id` is the question's id; otherwise the id is a hash of its text."""


@dataclass(frozen=True)
class Layout:
    """The columns of question and answer, and the functions that read their values; "" is an unreadable value."""

    question: str
    answer: str
    read_question: Callable[[Any], str]
    read_answer: Callable[[Any], str]


def _text(value: Any) -> str:
    return value.strip() if isinstance(value, str) else ""


def _question_of_prompt(value: Any) -> str:
    """The question in a text or a single user message, without DAPO's instructions: prompt templates add their own."""
    if not isinstance(value, str):
        messages = value if isinstance(value, list) else []
        roles = [message.get("role") for message in messages if isinstance(message, Mapping)]
        value = messages[0].get("content") if roles == ["user"] else None
    before, after = PROMPTS["dapo"].split("{question}")
    return _text(value).removeprefix(before.strip()).removesuffix(after.strip()).strip()


def _answer(value: Any) -> str:
    """A gold answer that `\\boxed{}` can hold: 142.0 as "142.0"; a list, also one written as text, joined by commas."""
    if isinstance(value, list):
        members = [_answer(member) for member in value]
        return ", ".join(members) if all(members) else ""
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        return ""
    text = str(value).strip()
    return normalise_gold(text) if text.startswith("[") else text


def _ground_truth(value: Any) -> str:
    return _answer(value.get("ground_truth")) if isinstance(value, Mapping) else ""


LAYOUTS = (
    Layout("prompt", "reward_model", _question_of_prompt, _ground_truth),  # DAPO-17K as published; verl's format
    Layout("prompt", "solution", _question_of_prompt, _answer),  # open-r1's copy of it: `solution` is the bare answer
    Layout("question", "final_answer", _text, _answer),  # OlympiadBench: a list
    Layout("question", "answer", _text, _answer),  # the format of expo; Minerva, AMC 2023
    Layout("problem", "answer", _text, _answer),  # AIME, MATH-500; AMC of AIMO has 142.0 for 142
    Layout("Problem", "Answer", _text, _answer),  # Maxwell-Jia/AIME_2024
)
"""Tried in this order: a table with `final_answer` or `answer` may also have a `solution`, a worked one."""


def choose_layout(name: str, columns: Iterable[str]) -> Layout:
    """The first layout whose columns are present.

    Raises: ConfigError, which names the columns, if no layout fits.
    """
    present = list(columns)
    for layout in LAYOUTS:
        if layout.question in present and layout.answer in present:
            return layout
    known = ", ".join(f"{layout.question} + {layout.answer}" for layout in LAYOUTS)
    raise ConfigError(f"{name} has the columns {', '.join(present) or '(none)'}; expected one of: {known}")


def columns_to_read(name: str, columns: Iterable[str]) -> list[str]:
    """The columns of a table that `read_table` uses.

    Raises: ConfigError, which names the columns, if no layout fits.
    """
    present = list(columns)
    layout = choose_layout(name, present)
    return [column for column in (layout.question, layout.answer, "id", "level") if column in present]


def read_table(table: Table) -> Iterator[Row]:
    """The rows of a table.

    Raises: ConfigError if no layout fits its first record, or if a record, which it names, has no question or answer.
    """
    layout = None
    for number, record in table.records:
        layout = layout or choose_layout(f"{table.name}:{number}", record)
        yield _read_record(table, number, record, layout)


def _read_record(table: Table, number: int, record: Record, layout: Layout) -> Row:
    where = f"{table.name}:{number}"
    text, answer = layout.read_question(record.get(layout.question)), layout.read_answer(record.get(layout.answer))
    for column, value in ((layout.question, text), (layout.answer, answer)):
        if not value:
            raise ConfigError(f"{where} has no usable `{column}`: {str(record.get(column))[:80]!r}; correct or drop it")
    given_id, level = record.get("id") if table.keeps_ids else None, record.get("level")
    return Row(where, text, answer, None if given_id is None else str(given_id), "" if level is None else str(level))
