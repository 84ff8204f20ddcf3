"""Prompt templates: the named ones, texts with {question}, and Jinja templates, as data.template takes them.

Jinja templates are rendered in Jinja2's immutable sandbox: they reach no file, no function and no attribute that could
run code. The values of a question are inserted as they are; template text inside them stays text.
"""

import functools
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import StrictUndefined, TemplateError, meta
from jinja2.sandbox import ImmutableSandboxedEnvironment

VARIABLES = ("question", "options", "context")
SUFFIXES = (".jinja", ".jinja2", ".j2")  # of template files
MOST_CHARS = 100_000  # of a template
MOST_SHOWN = 200  # characters of Jinja's message

PROMPTS = {
    "plain": "{question}",
    "boxed": "{question}\nReason step by step, and put your final answer within \\boxed{}.",
    "answer": (
        "{question}\nReason step by step. The last line of your response should be of the form Answer: X, where X is "
        "the final answer."
    ),
    "think-answer": (
        "{question}\nThink step by step within <think> and </think>, then give the final answer alone within <answer> "
        "and </answer>, as in <think> reasoning </think> <answer> final answer </answer>."
    ),
    "dapo": (
        "Solve the following math problem step by step. The last line of your response should be of the form "
        "Answer: $Answer (without quotes) where $Answer is the answer to the problem.\n\n{question}\n\n"
        'Remember to put your answer on its own line after "Answer:".'
    ),
}
"""Templates by name; `dapo` is the wording of DAPO-17K (arXiv 2503.14476), and the tags of `think-answer` are those of
DeepSeek-R1-Zero (arXiv 2501.12948)."""

_FIELD = re.compile(r"(?<!\{)\{question\}(?!\})")
_JINJA = re.compile(rf"\{{%|\{{\{{-?\s*(?:{'|'.join(VARIABLES)})\b")


@dataclass(frozen=True)
class PromptTemplate:
    """A template that can be rendered.

    variables: those of VARIABLES that it uses; render: from a mapping with all of them to the text. It raises what a
    template raises: a `jinja2.TemplateError`, or the errors of its expressions.
    """

    variables: frozenset[str]
    render: Callable[[Mapping[str, Any]], str]


def read_template(value: str) -> str:
    """A value of data.template as it is kept: a name or a text; of a file, its text.

    Raises: ValueError, of one line, if the file cannot be read, or the template cannot be used.
    """
    text = value
    if value.strip().endswith(SUFFIXES) and not _FIELD.search(value) and not _JINJA.search(value):
        text = _read_file(Path(value.strip()))
    parse_template(text)
    return text


def _read_file(path: Path) -> str:
    try:
        with path.open(encoding="utf-8") as file:
            text = file.read(MOST_CHARS + 2)
    except (OSError, ValueError) as error:  # ValueError: no UTF-8, or a path with a NUL character
        reason = getattr(error, "strerror", None) or "not UTF-8"
        raise ValueError(f"the file cannot be read ({reason}); give a Jinja file, or the template itself") from None
    return text.removesuffix("\n")


@functools.lru_cache(maxsize=16)
def parse_template(text: str) -> PromptTemplate:
    """The template of a name or a text. Raises: ValueError, of one line, if it cannot be used."""
    text = PROMPTS.get(text, text)
    if len(text) > MOST_CHARS:
        raise ValueError(f"the template has more than {MOST_CHARS:,} characters; shorten it")
    if not _FIELD.search(text):
        return _jinja_template(text)
    if _JINJA.search(text):
        raise ValueError("it mixes {question} with Jinja; write {{ question }} in a Jinja template")
    if len(_FIELD.findall(text)) > 1:
        raise ValueError("it must contain {question} once, where the question belongs")
    before, after = _FIELD.split(text)
    return PromptTemplate(frozenset({"question"}), lambda values: f"{before}{values['question']}{after}")


def _jinja_template(text: str) -> PromptTemplate:
    environment = ImmutableSandboxedEnvironment(
        undefined=StrictUndefined, autoescape=False, trim_blocks=True, lstrip_blocks=True
    )
    environment.globals.clear()  # what is no variable and no filter is an error before any question is read
    try:
        variables = meta.find_undeclared_variables(environment.parse(text))
        template = environment.from_string(text)
    except TemplateError as error:
        line = getattr(error, "lineno", None)
        raise ValueError(f"{'' if line is None else f'line {line}: '}{shorten_error(error)}; correct it") from None
    except (RecursionError, MemoryError, OverflowError):
        raise ValueError("the template is nested too deeply; simplify it") from None
    unknown = sorted(variables.difference(VARIABLES))
    if unknown:
        raise ValueError(
            f"the template uses {', '.join(unknown)[:MOST_SHOWN]}, but its variables are {', '.join(VARIABLES)}"
        )
    if "question" not in variables:
        raise ValueError(
            f"it must contain {{{{ question }}}}, or {{question}} once; or give a template file "
            f"({', '.join(SUFFIXES)}), or one of the names {', '.join(PROMPTS)}"
        )
    return PromptTemplate(frozenset(variables), template.render)


def shorten_error(error: Exception) -> str:
    """The type and the message of an error of a template, in one line of at most MOST_SHOWN characters."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:MOST_SHOWN]
