r"""The values of a table's columns: questions, gold answers and the choices of a question."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from decimal import Decimal
from string import ascii_uppercase
from typing import Any

from expo.data.prompts import PROMPTS
from expo.rewards.answers import normalise_gold, stated_gold

Golds = tuple[str, ...]
"""Gold answers, any of which is right; () for an unreadable value."""

GSM8K_MARK = "####"  # before the answer, after a worked solution
_DAPO = tuple(part.strip() for part in PROMPTS["dapo"].split("{question}"))
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


@dataclass(frozen=True)
class Choices:
    """The choices of a question: their labels with their texts, and how the question shows them."""

    by_label: Mapping[str, str]
    text: str
    are_numbers: bool = False

    @classmethod
    def read(cls, value: Any) -> "Choices":
        """Choices from a list, from {"label": [...], "text": [...]} (ARC), {"A": ..., "B": ...} (MedQA), or a text."""
        if isinstance(value, str):
            return cls({}, value.strip())
        if isinstance(value, Mapping) and isinstance(value.get("text"), list):
            members, labels = value["text"], value.get("label") or list(ascii_uppercase[: len(value["text"])])
        elif isinstance(value, Mapping):
            labels = [label for label, member in value.items() if member is not None]
            members = [value[label] for label in labels]
        else:
            members = list(value)
            labels = list(ascii_uppercase[: len(members)])
        texts = _without_labels([str(member).strip() for member in members], [str(label) for label in labels])
        by_label = dict(zip(map(str, labels), texts, strict=False))
        shown = "\n".join(f"({label}) {member}" for label, member in by_label.items())
        return cls(by_label, shown, any(not isinstance(member, str) for member in members))

    def golds(self, value: Any, golds: Golds) -> Golds:
        """The label of the right choice: `value` is its index from 0, its label or its text; () if it is none.

        Args:
            value: of the answer's column.
            golds: what that column holds by itself, the answer where the choices have no labels.
        """
        if not self.by_label or not golds:
            return golds
        labels = list(self.by_label)
        if isinstance(value, int) and not isinstance(value, bool) and not self.are_numbers:
            return (labels[value],) if 0 <= value < len(labels) else ()
        stated = golds[0]
        if stated in self.by_label:
            return (stated,)
        same = [label for label, member in self.by_label.items() if member == stated]
        return (same[0],) if len(same) == 1 else ()


def _without_labels(texts: list[str], labels: list[str]) -> list[str]:
    """The texts of choices without their labels, if every one begins with its own: "A)21"."""
    found = [
        re.match(rf"\(?{re.escape(label)}\s*[).:]\s*(?=\S)", member)
        for label, member in zip(labels, texts, strict=False)
    ]
    if not found or not all(found):
        return texts
    return [member[match.end() :] for member, match in zip(texts, found, strict=True) if match]
