"""Training questions that are evaluation questions too, word for word or nearly.

Exact: the same text once case, white space, dollars and LaTeX's sizing and spacing commands are gone. Near: at least
half of an evaluation question's telling runs of 8 tokens stand in one training question. A run is telling if at most 10
questions on either side hold it: "where m and n are relatively prime positive integers" is no sign of a copy. Questions
with fewer than 8 telling runs are compared exactly only. Rewording that keeps no 8 tokens in a row is not found.

Source: the n-gram search of GPT-3's appendix C (arXiv 2005.14165), there with runs of 13 words of which one is enough;
here tokens are words, numbers and single signs, and phrases that competition problems share would make every one match.
"""

import re
import sys
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from expo.data.questions import QuestionSet
from expo.errors import ConfigError
from expo.types import Question

RUN = 8  # tokens
MAX_HOLDERS = 10  # questions of one side that may hold a telling run
MIN_RUNS = 8  # telling runs that an evaluation question needs to be searched for
MIN_SHARE = 0.5

_DRESSING = re.compile(r"\\(?:left|right|displaystyle|quad|qquad)(?![a-z])|\\[,;:! ]|\\|[${}]")
_TOKEN = re.compile(r"[^\W\d_]+|\d+|[^\w\s]")


@dataclass(frozen=True)
class Match:
    """A training question that is an evaluation question of the set `name` too."""

    name: str
    evaluation: Question
    training: Question
    share: float
    """Of the evaluation question's telling runs, those in the training question; 1 if the match is exact."""
    kind: Literal["exact", "near"]


@dataclass(frozen=True)
class Overlap:
    """Every match between the training questions and the evaluation sets."""

    matches: tuple[Match, ...]

    def lines(self) -> list[str]:
        """One line for each set with matches, with the closest as an example."""
        found = defaultdict(list)
        for match in self.matches:
            found[match.name].append(match)
        return [_describe(name, matches) for name, matches in found.items()]

    def to_json(self) -> list[dict[str, Any]]:
        """The matches by their questions' ids."""
        return [
            {
                "set": match.name,
                "evaluation_id": match.evaluation.id,
                "training_id": match.training.id,
                "kind": match.kind,
                "share": round(match.share, 3),
            }
            for match in self.matches
        ]

    def drop_from(self, train: QuestionSet, what: Literal["none", "exact", "near"]) -> QuestionSet:
        """The training questions without those that match exactly; or, with "near", at all.

        Raises: ConfigError if none is left.
        """
        dropped = {match.training.id for match in self.matches if what in (match.kind, "near")}
        kept = tuple(question for question in train.questions if question.id not in dropped)
        if not kept:
            raise ConfigError(
                f"data.drop_overlap = {what} leaves no question of {train.source}; evaluate on other sets"
            )
        return replace(train, questions=kept, num_overlapping=len(dropped))


def _describe(name: str, matches: Sequence[Match]) -> str:
    counts = {kind: len({match.evaluation.id for match in matches if match.kind == kind}) for kind in ("exact", "near")}
    closest = max(matches, key=lambda match: match.share)
    text = " ".join(closest.evaluation.text.split())
    return (
        f"overlap: {counts['exact']} questions of {name} are training questions too, {counts['near']} nearly so; "
        f"for example {closest.evaluation.id} is {closest.training.id}: {text[:80]}{'...' if len(text) > 80 else ''}"
    )


def find_overlap(train: QuestionSet, evaluation: Mapping[str, QuestionSet]) -> Overlap:
    """Every pair of a training and an evaluation question that are the same or nearly; time grows with their number."""
    targets = [(name, question) for name, loaded in evaluation.items() for question in loaded.questions]
    if not targets:
        return Overlap(())
    target_tokens = [_tokens(question.text) for _, question in targets]
    training_tokens = [_tokens(question.text) for question in train.questions]
    same: dict[tuple[str, ...], list[int]] = defaultdict(list)
    for index, tokens in enumerate(target_tokens):
        same[tokens].append(index)
    index_of_runs = _index_telling_runs(target_tokens, training_tokens)
    num_runs = Counter(index for holders in index_of_runs.values() for index in holders)
    matches = []
    for question, tokens in zip(train.questions, training_tokens, strict=True):
        exact = same.get(tokens, [])
        matches += [Match(*targets[index], question, 1.0, "exact") for index in exact]
        shared = Counter(index for run in _runs(tokens) for index in index_of_runs.get(run, ()))
        for index, count in shared.items():
            share = count / num_runs[index]
            if index not in exact and num_runs[index] >= MIN_RUNS and share >= MIN_SHARE:
                matches.append(Match(*targets[index], question, share, "near"))
    return Overlap(tuple(matches))


def _index_telling_runs(
    targets: Sequence[tuple[str, ...]], training: Sequence[tuple[str, ...]]
) -> dict[tuple[str, ...], list[int]]:
    """The evaluation questions that hold each telling run."""
    holders: dict[tuple[str, ...], list[int]] = defaultdict(list)
    for index, tokens in enumerate(targets):
        for run in _runs(tokens):
            holders[run].append(index)
    num_training = Counter(run for tokens in training for run in _runs(tokens) if run in holders)
    return {
        run: indices
        for run, indices in holders.items()
        if len(indices) <= MAX_HOLDERS and num_training[run] <= MAX_HOLDERS
    }


def _tokens(text: str) -> tuple[str, ...]:
    plain = unicodedata.normalize("NFKC", text).casefold()
    # interned: a set of questions has few different tokens
    return tuple(map(sys.intern, _TOKEN.findall(_DRESSING.sub(" ", plain))))


def _runs(tokens: tuple[str, ...]) -> set[tuple[str, ...]]:
    return {tokens[start : start + RUN] for start in range(len(tokens) - RUN + 1)}
