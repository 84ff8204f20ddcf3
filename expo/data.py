"""Questions with checkable answers, and the prompts made of them.

A question file is JSON lines with `question`, `answer`, and optionally `id` and `level` (a name for its difficulty,
reported apart by evaluations). Equal questions are kept once: the curriculum holds one pass rate per question, so a
file that repeats its questions would be learnt wrongly.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from expo import arithmetic, ledger
from expo.config import ConfigError, DataSection

PROMPTS = {
    "plain": "{question}",
    "boxed": "{question}\nReason step by step, and put your final answer within \\boxed{{}}.",
    "dapo": (
        "Solve the following math problem step by step. The last line of your response should be of the form "
        "Answer: $Answer (without quotes) where $Answer is the answer to the problem.\n\n{question}\n\n"
        'Remember to put your answer on its own line after "Answer:".'
    ),
}
"""Templates by name; `dapo` is the wording of DAPO-17K (arXiv 2503.14476)."""

BUILT_IN: dict[str, Callable[[], list[ledger.LedgerQuestion]]] = {
    "ledger:train": partial(ledger.train_questions, seed=0),
    "ledger:held_out": ledger.held_out_questions,
    "ledger:beyond": ledger.beyond_questions,
    "arithmetic:train": arithmetic.train_questions,
    "arithmetic:held_out": arithmetic.held_out_questions,
}
"""Question sets that need no file, by the name that stands for one in a config."""


@dataclass(frozen=True)
class Question:
    """One question: a stable `id`, its `text`, the gold `answer`, and the name of its difficulty `level`."""

    id: str
    text: str
    answer: str
    level: str = ""


@dataclass(frozen=True)
class Prompted:
    """A question and the token ids that ask it."""

    question: Question
    prompt_ids: list[int]


@dataclass(frozen=True)
class QuestionSet:
    """Distinct questions of one source, and how many rows were left out as duplicates."""

    source: str
    questions: tuple[Question, ...]
    num_duplicates: int = 0


_Row = tuple[str, str, str | None, str]  # text, answer, given id, level


def load_questions(source: str) -> QuestionSet:
    """The questions of a JSON-lines file, or of a built-in set such as "ledger:train".

    Raises: ConfigError if the file cannot be read, is empty, or a line is not a question; the line is named.
    """
    built_in = BUILT_IN.get(source)
    rows: list[_Row]
    rows = [(q.question, q.answer, None, q.level) for q in built_in()] if built_in else _read_rows(source)
    if not rows:
        raise ConfigError(f"{source} holds no questions; expected JSON lines with `question` and `answer`")
    questions: dict[str, Question] = {}
    for text, answer, given_id, level in rows:
        key = given_id or question_id(text)
        seen = questions.setdefault(key, Question(id=key, text=text, answer=answer, level=level))
        if (seen.text, seen.answer) != (text, answer):
            raise ConfigError(f"{source}: question {key} comes twice, with different texts or answers; make ids unique")
    return QuestionSet(source, tuple(questions.values()), len(rows) - len(questions))


def question_id(text: str) -> str:
    """16 hexadecimal digits that depend on the text alone, white space aside."""
    return hashlib.sha256(" ".join(text.split()).encode()).hexdigest()[:16]


def _read_rows(source: str) -> list[_Row]:
    path = Path(source)
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        built_in = ", ".join(BUILT_IN)
        raise ConfigError(
            f"cannot read the question file {source}: {getattr(error, 'strerror', None) or 'not UTF-8'}; "
            f"give a JSON-lines file or one of {built_in}"
        ) from error
    return [_read_row(f"{source}:{number}", line) for number, line in enumerate(lines, 1) if line.strip()]


def _read_row(where: str, line: str) -> _Row:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise ConfigError(f"{where} is not JSON ({error.msg}); expected one object a line") from error
    if not isinstance(row, dict) or not isinstance(row.get("question"), str) or not row["question"].strip():
        raise ConfigError(f'{where} has no `question` text; expected {{"question": "...", "answer": "..."}}')
    answer = row.get("answer")
    if isinstance(answer, bool) or not isinstance(answer, str | int | float) or not str(answer).strip():
        raise ConfigError(f"{where} has no `answer`; expected a text or a number")
    given_id = row.get("id")
    return (
        row["question"],
        str(answer),
        None if given_id is None else str(given_id),
        str(row.get("level", "")),
    )


def render_prompt(question: Question, config: DataSection, tokenizer: Any) -> list[int]:
    """Token ids of what the model is asked, ending where its reply begins."""
    text = PROMPTS[config.prompt].format(question=question.text)
    if not config.chat_template:
        return list(tokenizer(text)["input_ids"])
    message = [{"role": "user", "content": text}]
    encoded = tokenizer.apply_chat_template(message, add_generation_prompt=True, return_dict=True)
    return list(encoded["input_ids"])


def render_prompts(questions: Sequence[Question], config: DataSection, tokenizer: Any) -> list[Prompted]:
    """The questions whose prompts fit data.max_prompt_tokens, with those prompts.

    Raises: ConfigError if the tokenizer has no chat template though one is asked for, or no prompt fits.
    """
    if config.chat_template and not getattr(tokenizer, "chat_template", None):
        raise ConfigError("data.chat_template is true, but the tokenizer has none; set --data.chat_template=false")
    rendered = [Prompted(question, render_prompt(question, config, tokenizer)) for question in questions]
    fitting = [prompted for prompted in rendered if len(prompted.prompt_ids) <= config.max_prompt_tokens]
    if not fitting:
        shortest = min(len(prompted.prompt_ids) for prompted in rendered)
        raise ConfigError(
            f"no prompt fits data.max_prompt_tokens = {config.max_prompt_tokens}; the shortest has {shortest} tokens"
        )
    return fitting
