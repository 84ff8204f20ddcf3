r"""The values of a table's columns: questions, gold answers and the choices of a question."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from decimal import Decimal
from string import ascii_uppercase
from typing import Any

from expo.config.templates import PROMPTS
from expo.rewards.answers import normalise_gold, stated_gold

Golds = tuple[str, ...]
"""Gold answers, any of which is right; () for an unreadable value."""

GSM8K_MARK = "####"  # before the answer, after a worked solution
_DAPO = tuple(part.strip() for part in PROMPTS["dapo"].split("{question}"))
_BRACKETED_LABEL = re.compile(r"\(?\s*(\w{1,9}?)\s*[).:]{0,2}")  # "(b)", "B."
_UNIT_IN_BRACKETS = re.compile(r"(\S+) \([a-zA-Z .'/-]+\)")  # ASDiv: "9 (apples)"


def text(value: Any) -> str:
    """A text without white space around it; "" for any other value."""
    return value.strip() if isinstance(value, str) else ""


def read_question(value: Any) -> tuple[str, str]:
    """System message and question of a text or of chat messages; ("", "") if they hold other turns.

    DAPO's instructions are left out: prompt templates add their own.
    """
    system = ""
    if isinstance(value, list):
        messages = [message for message in value if isinstance(message, Mapping)]
        contents = [text(message.get("content")) for message in messages]
        roles = [message.get("role") for message in messages]
        if len(messages) != len(value) or roles not in (["user"], ["system", "user"]):
            return "", ""
        system, value = contents[0] if len(roles) == 2 else "", contents[-1]
    before, after = _DAPO
    return system, text(value).removeprefix(before).removesuffix(after).strip()


def gold_text(value: Any) -> str:
    """A gold answer that `\\boxed{}` can hold: 142.0 as "142.0"; a list, also one written as text, joined by commas.

    Of GSM8K's worked solutions it is what follows "####". NaN and infinity are no answers.
    """
    if isinstance(value, list):
        members = [gold_text(member) for member in value]
        return ", ".join(members) if all(members) else ""
    if isinstance(value, bool) or not isinstance(value, str | int | float | Decimal):
        return ""
    if isinstance(value, float | Decimal) and not math.isfinite(value):
        return ""
    answer = str(value).strip()
    if GSM8K_MARK in answer:
        answer = answer.rsplit(GSM8K_MARK, 1)[1].strip()
    with_unit = _UNIT_IN_BRACKETS.fullmatch(answer)
    if with_unit and with_unit[1][0].isdecimal():
        answer = with_unit[1]
    return normalise_gold(answer) if answer.startswith("[") else answer


def single_gold(value: Any) -> Golds:
    """The one gold answer; all members of a list are part of it."""
    answer = gold_text(value)
    return (answer,) if answer else ()


def accepted_golds(value: Any) -> Golds:
    """The accepted answers of a list, any of which is right."""
    if not isinstance(value, list):
        return single_gold(value)
    golds = [gold_text(member) for member in value]
    return tuple(dict.fromkeys(golds)) if all(golds) else ()


def ground_truth(value: Any) -> Golds:
    """The answers of verl's `reward_model`: `ground_truth`, of which any member of a list is accepted."""
    truth = value.get("ground_truth") if isinstance(value, Mapping) else None
    # Search-R1: {"target": [...]}
    return accepted_golds(truth.get("target") if isinstance(truth, Mapping) else truth)


def worked_gold(value: Any) -> Golds:
    """The answer of a worked solution: its last box, or what follows GSM8K's "####"."""
    return boxed_gold(value) or (single_gold(value) if GSM8K_MARK in text(value) else ())


def boxed_gold(value: Any) -> Golds:
    """The last boxed answer of a worked solution."""
    solution = text(value)
    stated = stated_gold(solution)
    return single_gold(stated) if stated != solution else ()


def any_gold(value: Any) -> Golds:
    """The answer of a column that data.columns names, in any of these forms."""
    if isinstance(value, Mapping):
        return ground_truth(value)
    return boxed_gold(value) or single_gold(value)


def context_text(value: Any) -> str:
    """The text of a context column: a text, or a list of texts; "" for none. Raises: ValueError for another value."""
    if value is None:
        return ""
    paragraphs = value if isinstance(value, list) else [value]
    if not all(isinstance(paragraph, str) for paragraph in paragraphs):
        raise ValueError("expected a text or a list of texts")
    return "\n\n".join(filter(None, map(str.strip, paragraphs)))


@dataclass(frozen=True)
class Choices:
    """The choices of a question: their texts by label, "" for choices that are one text; the labels in order, those of
    choices that are null too; and whether they were numbers.
    """

    by_label: Mapping[str, str]
    labels: tuple[str, ...] = ()
    are_numbers: bool = False

    @classmethod
    def read(cls, value: Any) -> "Choices":
        """Choices from a list, from {"label": [...], "text": [...]} (ARC), a list of {"label": ..., "text": ...},
        {"A": ..., "B": ...} (MedQA), or a text. A choice that is null is left out.

        Raises: ValueError for another value.
        """
        if value is None or isinstance(value, str):
            return cls({"": value.strip()} if value and value.strip() else {})
        labels, members = _labels_and_members(value)
        labels = [str(label) for label in labels]
        known = [(label, member) for label, member in zip(labels, members, strict=True) if member is not None]
        if not all(isinstance(member, str | int | float | Decimal) for _, member in known):
            raise ValueError("expected texts or numbers")
        if len(set(labels)) < len(labels):
            raise ValueError("two options have the same label")
        texts = _without_labels([str(member).strip() for _, member in known], [label for label, _ in known])
        by_label = {label: member for (label, _), member in zip(known, texts, strict=True)}
        return cls(by_label, tuple(labels), any(not isinstance(member, str) for _, member in known))

    @property
    def options(self) -> tuple[tuple[str, str], ...]:
        """Label and text of each choice."""
        return tuple(self.by_label.items())

    def golds(self, value: Any, golds: Golds) -> Golds:
        """The label of the right choice: `value` is its index from 0, its label or its text; () if it is none.

        Args:
            value: of the answer's column.
            golds: what that column holds by itself, the answer where the choices have no labels.
        """
        if not golds or not self.labels or not self.by_label:
            return golds
        if isinstance(value, int | float | Decimal) and not isinstance(value, bool) and not self.are_numbers:
            label = self.labels[int(value)] if value == int(value) and 0 <= value < len(self.labels) else ""
            return (label,) if label in self.by_label else ()
        stated = golds[0]
        if stated in self.by_label:
            return (stated,)
        same = [label for label, member in self.by_label.items() if member == stated]
        if not same and (match := _BRACKETED_LABEL.fullmatch(stated)):
            same = [label for label in self.by_label if label.upper() == match[1].upper()]
        return (same[0],) if len(same) == 1 else ()


def _labels_and_members(value: Any) -> tuple[list[Any], list[Any]]:
    if isinstance(value, list) and value and all(isinstance(member, Mapping) for member in value):
        if not all({"label", "text"} <= set(member) for member in value):
            raise ValueError("expected a label and a text in each option")
        return [member["label"] for member in value], [member["text"] for member in value]
    if isinstance(value, list):
        return _letters(len(value)), value
    if not isinstance(value, Mapping):
        raise ValueError("expected a list, an object or a text")
    if not isinstance(value.get("text"), list):
        return list(value), list(value.values())
    labels = value.get("label") or _letters(len(value["text"]))
    if not isinstance(labels, list) or len(labels) != len(value["text"]):
        raise ValueError("expected as many labels as texts")
    return labels, value["text"]


def _letters(count: int) -> list[str]:
    if count > len(ascii_uppercase):
        raise ValueError(f"{count} options are more than there are letters")
    return list(ascii_uppercase[:count])


def _without_labels(texts: list[str], labels: list[str]) -> list[str]:
    """The texts of choices without their labels, if every one begins with its own: "A)21"."""
    found = [
        re.match(rf"\(?{re.escape(label)}\s*[).:]\s*(?=\S)", member)
        for label, member in zip(labels, texts, strict=False)
    ]
    if not found or not all(found):
        return texts
    return [member[match.end() :] for member, match in zip(texts, found, strict=True) if match]
