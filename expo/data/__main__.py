"""`python -m expo.data show | check SOURCE`: prints prompts as the model gets them, and reports problems of a set.

SOURCE may also be the YAML file of a run: its training questions, model, prompt and verifier.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from expo.config import DataSection, ModelSection, RewardSection, load_config
from expo.data import sources
from expo.data.gradable import bad_questions
from expo.data.layouts import ReadOptions
from expo.data.overlap import find_overlap
from expo.data.prompts import PROMPTS, prompt_warnings, render_prompt
from expo.data.questions import QuestionSet
from expo.data.record import set_lines
from expo.errors import ConfigError
from expo.rewards.answers import normalise_gold
from expo.rewards.methods import what_is_read
from expo.runtime.cli import FlagText, flag_value
from expo.runtime.config_errors import explain
from expo.runtime.console import printable
from expo.runtime.endings import errors_on_one_line
from expo.runtime.parser import CONFIG_SUFFIXES, OneLineParser
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
    section, model, verifier = _settings(arguments)
    if model is None:
        raise ConfigError("no model; give --model=PATH, whose tokenizer makes the prompts, or the YAML file of a run")
    loaded = sources.load_questions(section.train, ReadOptions.of(section))
    tokenizer = _tokenizer(model)
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
    print(f"the verifier ({verifier}) reads {what_is_read(verifier)}")
    for line in prompt_warnings({section.train: prompts}, section, verifier, tokenizer):
        print(line)
    return 0


def check(arguments: argparse.Namespace) -> int:
    """Prints rows, duplicates, ungradable answers, longest prompts and overlaps; 1 if answers are ungradable."""
    section, model, _ = _settings(arguments)
    options = ReadOptions.of(section)
    loaded = sources.load_questions(section.train, options)
    print(f"{loaded.num_rows:,} rows")
    print(*set_lines(loaded), sep="\n")
    _print_longest(loaded, section, model)
    for against in arguments.against:
        other = sources.load_questions(against, replace(options, needs_columns=False))
        lines = find_overlap(loaded, {against: other}).lines()
        print(*(lines or [f"overlap: none with {against}"]), sep="\n")
    bad = bad_questions(loaded)
    print(f"{len(bad):,} gold answers cannot be graded" + (":" if bad else ""))
    for question in bad:
        print(f"  {printable(question.id)}  {question.answer!r}")
    return 1 if bad else 0


def _print_longest(loaded: QuestionSet, section: DataSection, model: ModelSection | None) -> None:
    if model is None:
        unit, lengths = "characters (give --model for tokens)", {q.id: len(q.text) for q in loaded.questions}
    else:
        unit, tokenizer = "tokens", _tokenizer(model)
        lengths = {question.id: len(render_prompt(question, section, tokenizer)) for question in loaded.questions}
    longest = sorted(lengths, key=lambda key: -lengths[key])[:NUM_LONGEST]
    print(f"longest prompts, {unit}: {', '.join(f'{key} {lengths[key]:,}' for key in longest)}")


class _Settings(NamedTuple):
    data: DataSection
    model: ModelSection | None
    verifier: str


def _settings(arguments: argparse.Namespace) -> _Settings:
    """The settings of the flags, and for the others those of the YAML file, or else the defaults."""
    config = load_config(Path(arguments.source)) if arguments.source.endswith(CONFIG_SUFFIXES) else None
    given = {name: value for name, value in vars(arguments).items() if value is not None}
    values: dict[str, Any] = {"train": arguments.source} if config is None else config.data.model_dump()
    values |= {name: flag_value(name, given[name]) for name in YAML_FLAGS if name in given}
    values |= {name: given[name] for name in ("prompt", "chat_template") if name in given}
    if "prompt" in given and "template" not in given:
        values["template"] = None  # which would be taken in its place
    try:
        section = DataSection(**values)
    except ValidationError as error:
        raise ConfigError("; ".join(_flag_problem(item) for item in error.errors())) from error
    model, reward = (None, RewardSection()) if config is None else (config.model, config.reward)
    if "model" in given:
        model = ModelSection(path=given["model"])
    return _Settings(section, model, given.get("verifier", reward.verifier))


def _flag_problem(item: ErrorDetails) -> str:
    text = explain(item, ())
    field = str(item["loc"][0]) if item["loc"] else ""
    return f"--{text.replace(field, field.replace('_', '-'), 1)}" if field else text


def _tokenizer(model: ModelSection) -> Any:
    # imports transformers, which a check without a model does not need
    from expo.learner.model_files import load_tokenizer

    return load_tokenizer(model)


def _parser(prog: str) -> argparse.ArgumentParser:
    parser = OneLineParser(prog=prog, description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="show | check")
    for run, summary in ((show, "print a few prompts"), (check, "report the size and the problems of a set")):
        command = commands.add_parser(
            run.__name__, help=summary, description=run.__doc__, epilog=sources.__doc__,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )  # fmt: skip
        command.set_defaults(run=run)
        command.add_argument("source", metavar="SOURCE", help="as data.train, or the YAML file of a run")
        command.add_argument("--model", metavar="PATH", help="model whose tokenizer is used; as model.path")
        command.add_argument("--prompt", choices=list(PROMPTS), help="as data.prompt")
        command.add_argument(
            "--chat-template", action=argparse.BooleanOptionalAction, default=None, help="as data.chat_template"
        )
        for field in YAML_FLAGS:
            flag = f"--{field.replace('_', '-')}"
            kind = FlagText if field in ("template", "system") else str
            command.add_argument(flag, dest=field, metavar="VALUE", type=kind, help=f"as data.{field}")
    commands.choices["show"].add_argument("--verifier", metavar="NAME", help="as reward.verifier (default: math)")
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
