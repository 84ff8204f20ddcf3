"""Compares what the ranks of a run were given: configuration, questions, prompts and the files of the model.

Ranks that differ in any of it would train or grade on different things without an error.
"""

import hashlib
from collections.abc import Iterable, Mapping, Sequence

from expo.config.section import Config
from expo.data import QuestionSet
from expo.runtime.distributed import Ranks
from expo.types import Prompt


def require_same_settings(config: Config, ranks: Ranks, *, resume: bool = False) -> None:
    """Raises: ConfigError, on every rank, that names the rank and the setting that differ."""
    settings = {name: repr(value) for name, value in config.settings.items()}
    ranks.require_equal(
        {**settings, "--resume": str(resume)}, "start every rank with the same command line and configuration file"
    )


def require_same_inputs(
    sets: Mapping[str, QuestionSet], prompts: Mapping[str, Sequence[Prompt]], model: Mapping[str, str], ranks: Ranks
) -> None:
    """Raises: ConfigError, on every rank, that names the rank, and the set or file, that differ.

    Args:
        sets: by the config field that names them.
        prompts: of each set.
        model: digests of the model's files, by name.
        ranks: the processes of the run.
    """
    facts = {f"{name} of model.path": digest for name, digest in model.items()}
    for name, loaded in sets.items():
        facts.update({f"{what} of {name}": value for what, value in _question_facts(loaded).items()})
        facts[f"the prompts of {name}"] = _digest(prompt.prompt_ids for prompt in prompts[name])
    ranks.require_equal(facts, "give every rank the same files; a shared file system is the easiest way")


def _question_facts(loaded: QuestionSet) -> dict[str, str]:
    questions = sorted(loaded.questions, key=lambda question: question.id)
    texts = ((question.id, question.text, question.level, question.system) for question in questions)
    return {
        "the number of questions": str(len(questions)),
        "the questions": _digest(texts),
        "the answers": _digest((question.id, *question.golds) for question in questions),
        "the order of the questions": _digest(question.id for question in loaded.questions),
    }


def _digest(items: Iterable[object]) -> str:
    hashed = hashlib.sha256()
    for item in items:
        hashed.update(repr(item).encode("utf-8", "surrogatepass") + b"\n")
    return f"sha256 {hashed.hexdigest()[:16]}"
