"""Finds training questions that have the same or nearly the same text as an evaluation question (contamination).

Exact match: the texts are equal after removing case, white space, dollars and LaTeX's sizing and spacing commands.
Near match: a training question contains at least half of the evaluation question's rare 8-grams. An 8-gram is rare if
at most 10 training and at most 10 evaluation questions contain it, which excludes phrases such as "where m and n are
relatively prime positive integers". An evaluation question with fewer than 8 rare 8-grams has exact matches only. A
paraphrase without 8 consecutive tokens in common is not found.

Source: the n-gram search of GPT-3 (arXiv 2005.14165, appendix C), in which one shared 13-gram of words is a match. Here
tokens are words, numbers and single signs, and one shared n-gram would match all competition problems with a common
phrase.
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

NGRAM = 8  # tokens
MAX_QUESTIONS = 10  # training or evaluation questions that may contain a rare n-gram
MIN_NGRAMS = 8  # rare n-grams that an evaluation question needs for a near match
MIN_SHARE = 0.5  # of the rare n-grams of an evaluation question, for a near match

_FORMATTING = re.compile(r"\\(?:left|right|displaystyle|quad|qquad)(?![a-z])|\\[,;:! ]|\\|[${}]")
_TOKEN = re.compile(r"[^\W\d_]+|\d+|[^\w\s]")


@dataclass(frozen=True)
class Match:
    """A training question that has the text of an evaluation question of the set `name`."""

    name: str
    evaluation: Question
    training: Question
    share: float
    """Share of the evaluation question's rare n-grams that the training question contains; 1 for an exact match."""
    kind: Literal["exact", "near"]


@dataclass(frozen=True)
class Overlap:
    """Every match between the training questions and the evaluation sets."""

    matches: tuple[Match, ...]

    def lines(self) -> list[str]:
        """One line for each set with matches, with the closest match as an example."""
        found = defaultdict(list)
        for match in self.matches:
            found[match.name].append(match)
        return [_describe(name, matches) for name, matches in found.items()]

    def to_json(self) -> list[dict[str, Any]]:
        """The matches, for data.json."""
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
        """The training set without exact matches; with "near", without any matches; with "none", unchanged.

        Raises: ConfigError if no question is left.
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
    """Every exact and near match between training and evaluation questions; time is linear in their number."""
    targets = [(name, question) for name, loaded in evaluation.items() for question in loaded.questions]
    if not targets:
        return Overlap(())
    target_tokens = [_tokens(question.text) for _, question in targets]
    training_tokens = [_tokens(question.text) for question in train.questions]
    same_text: dict[tuple[str, ...], list[int]] = defaultdict(list)
    for index, tokens in enumerate(target_tokens):
        same_text[tokens].append(index)
    targets_of_ngram = _index_rare_ngrams(target_tokens, training_tokens)
    num_ngrams = Counter(index for indices in targets_of_ngram.values() for index in indices)
    matches = []
    for question, tokens in zip(train.questions, training_tokens, strict=True):
        exact = same_text.get(tokens, [])
        matches += [Match(*targets[index], question, 1.0, "exact") for index in exact]
        shared = Counter(index for ngram in _ngrams(tokens) for index in targets_of_ngram.get(ngram, ()))
        for index, count in shared.items():
            share = count / num_ngrams[index]
            if index not in exact and num_ngrams[index] >= MIN_NGRAMS and share >= MIN_SHARE:
                matches.append(Match(*targets[index], question, share, "near"))
    return Overlap(tuple(matches))


def _index_rare_ngrams(
    targets: Sequence[tuple[str, ...]], training: Sequence[tuple[str, ...]]
) -> dict[tuple[str, ...], list[int]]:
    """The indices of the evaluation questions that contain each rare n-gram."""
    containing: dict[tuple[str, ...], list[int]] = defaultdict(list)
    for index, tokens in enumerate(targets):
        for ngram in _ngrams(tokens):
            containing[ngram].append(index)
    num_training = Counter(ngram for tokens in training for ngram in _ngrams(tokens) if ngram in containing)
    return {
        ngram: indices
        for ngram, indices in containing.items()
        if len(indices) <= MAX_QUESTIONS and num_training[ngram] <= MAX_QUESTIONS
    }


def _tokens(text: str) -> tuple[str, ...]:
    plain = unicodedata.normalize("NFKC", text).casefold()
    # interned to save memory: a set of questions has few distinct tokens
    return tuple(map(sys.intern, _TOKEN.findall(_FORMATTING.sub(" ", plain))))


def _ngrams(tokens: tuple[str, ...]) -> set[tuple[str, ...]]:
    return {tokens[start : start + NGRAM] for start in range(len(tokens) - NGRAM + 1)}
