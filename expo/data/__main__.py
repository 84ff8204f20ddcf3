"""`python -m expo.data show | check SOURCE`: prints prompts as the model gets them, and reports problems of a set."""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from expo.config import DataSection, ModelSection, RewardSection
from expo.data import sources
from expo.data.gradable import bad_questions
from expo.data.layouts import ReadOptions
from expo.data.overlap import find_overlap
from expo.data.prompts import PROMPTS, render_prompt, unasked_warning
from expo.data.questions import QuestionSet
from expo.data.record import set_lines
from expo.errors import ConfigError
from expo.rewards.answers import normalise_gold
from expo.rewards.methods import what_is_read
from expo.runtime.cli import FlagText, flag_value
from expo.runtime.config_errors import explain
from expo.runtime.console import printable
from expo.runtime.endings import errors_on_one_line
from expo.runtime.parser import OneLineParser
from expo.types import Prompt

PROGRAM = "python -m expo.data"
NUM_LONGEST = 3
YAML_FLAGS = ("columns", "template", "system", "chat_template_kwargs")


def show(arguments: argparse.Namespace) -> int:
    """Prints some prompts exactly as the model gets them, with special tokens, their gold answers, and what the
    verifier reads of a reply. Control characters are shown as escapes.
    """
    if arguments.n < 1:
        raise ConfigError(f"-n = {arguments.n}; expected a number of prompts, at least 1")
    section = _section(arguments)
    reads = what_is_read(arguments.verifier)
    loaded = sources.load_questions(arguments.source, ReadOptions.of(section))
    tokenizer = _tokenizer(arguments.model)
    prompts = [
        Prompt(question, render_prompt(question, section, tokenizer)) for question in loaded.questions[: arguments.n]
    ]
    for number, prompt in enumerate(prompts, 1):
        question = prompt.question
        text = tokenizer.decode(prompt.prompt_ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        level = f", level {question.level}" if question.level else ""
        title = f"question {number} of {len(loaded.questions)}: id {question.id}{level}"
        print(f"{printable(title)}, {len(prompt.prompt_ids)} tokens")
        print("-" * 80, printable(text, keep="\n\t"), "-" * 80, sep="\n")
        for gold in question.golds:
            print(printable(f"gold answer: {gold}    graded as: {normalise_gold(gold)}"))
        print()
    print(f"the verifier ({arguments.verifier}) reads {reads}")
    for line in unasked_warning(arguments.source, prompts, section, arguments.verifier, tokenizer):
        print(line)
    return 0


def check(arguments: argparse.Namespace) -> int:
    """Prints rows, duplicates, ungradable answers, longest prompts and overlaps; 1 if answers are ungradable."""
    options = ReadOptions.of(_section(arguments))
    loaded = sources.load_questions(arguments.source, options)
    print(f"{loaded.num_rows:,} rows")
    print(*set_lines(loaded), sep="\n")
    _print_longest(loaded, arguments)
    for against in arguments.against:
        other = sources.load_questions(against, replace(options, needs_columns=False))
        lines = find_overlap(loaded, {against: other}).lines()
        print(*(lines or [f"overlap: none with {against}"]), sep="\n")
    bad = bad_questions(loaded)
    print(f"{len(bad):,} gold answers cannot be graded" + (":" if bad else ""))
    for question in bad:
        print(f"  {printable(question.id)}  {question.answer!r}")
    return 1 if bad else 0


def _print_longest(loaded: QuestionSet, arguments: argparse.Namespace) -> None:
    if arguments.model is None:
        unit, lengths = "characters (give --model for tokens)", {q.id: len(q.text) for q in loaded.questions}
    else:
        section, tokenizer = _section(arguments), _tokenizer(arguments.model)
        unit = "tokens"
        lengths = {question.id: len(render_prompt(question, section, tokenizer)) for question in loaded.questions}
    longest = sorted(lengths, key=lambda key: -lengths[key])[:NUM_LONGEST]
    print(f"longest prompts, {unit}: {', '.join(f'{key} {lengths[key]:,}' for key in longest)}")


def _section(arguments: argparse.Namespace) -> DataSection:
    given = vars(arguments)
    fields = [field for field in ("prompt", "chat_template", *YAML_FLAGS) if given[field] is not None]
    values = {field: flag_value(field, given[field]) if field in YAML_FLAGS else given[field] for field in fields}
    try:
        return DataSection(train=arguments.source, **values)
    except ValidationError as error:
        raise ConfigError("; ".join(_flag_problem(item) for item in error.errors())) from error


def _flag_problem(item: ErrorDetails) -> str:
    text = explain(item, ())
    field = str(item["loc"][0]) if item["loc"] else ""
    return f"--{text.replace(field, field.replace('_', '-'), 1)}" if field else text


def _tokenizer(path: str) -> Any:
    # imports transformers, which a check without --model does not need
    from expo.learner.model_files import load_tokenizer

    return load_tokenizer(ModelSection(path=path))


def _parser(prog: str) -> argparse.ArgumentParser:
    parser = OneLineParser(prog=prog, description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="show | check")
    for run, summary in ((show, "print a few prompts"), (check, "report the size and the problems of a set")):
        command = commands.add_parser(
            run.__name__, help=summary, description=run.__doc__, epilog=sources.__doc__,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )  # fmt: skip
        command.set_defaults(run=run)
        command.add_argument("source", metavar="SOURCE", help="as data.train")
        command.add_argument(
            "--model", required=run is show, metavar="PATH", help="model whose tokenizer is used; as model.path"
        )
        command.add_argument("--prompt", choices=list(PROMPTS), default=DataSection.model_fields["prompt"].default)
        command.add_argument(
            "--chat-template", action=argparse.BooleanOptionalAction, default=True, help="as data.chat_template"
        )
        for field in YAML_FLAGS:
            flag = f"--{field.replace('_', '-')}"
            kind = FlagText if field in ("template", "system") else str
            command.add_argument(flag, dest=field, metavar="VALUE", type=kind, help=f"as data.{field}")
    commands.choices["show"].add_argument(
        "--verifier", metavar="NAME", default=RewardSection().verifier, help="as reward.verifier (default: math)"
    )
    commands.choices["show"].add_argument("-n", type=int, default=3, metavar="N", help="how many (default: 3)")
    commands.choices["check"].add_argument(
        "--against", nargs="+", default=[], metavar="SOURCE", help="evaluation sets to search for the same questions"
    )
    return parser


def main(argv: Sequence[str] | None = None, prog: str = PROGRAM) -> int:
    """The command line of `prog`.

    Exit codes: 0; 1 if a check finds ungradable answers; 2, with one line on stderr, if a source is wrong; 130 after
    Ctrl-C.
    """
    arguments = _parser(prog).parse_args(argv)
    with errors_on_one_line(prog):
        return int(arguments.run(arguments))


if __name__ == "__main__":
    sys.exit(main())
