"""How an evaluation was made, in facts that two of them can be told apart by, and the part of one that is done."""

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from expo.config import RunConfig
from expo.data import QuestionSet
from expo.data.record import left_out
from expo.types import Prompt

PROTOCOL = "protocol.json"  # the facts, written before the first reply
REPLIES = "replies"  # .jsonl: every reply, those of a question side by side
RESULTS = "results.json"  # the facts and the scores
MAX_SHOWN = 40  # characters of a value in a message; prompts and checksums are longer


def protocol_of(config: RunConfig) -> dict[str, Any]:
    """Every setting that the numbers of an evaluation depend on, beside model, questions and software."""
    section = config.evaluation
    return {
        "num_samples": section.num_samples,
        "temperature": section.temperature,
        "top_p": section.top_p,
        "max_new_tokens": config.rollout.max_new_tokens,
        "seed": config.run.seed,
        "prompt": config.data.prompt,
        "chat_template": config.data.chat_template,
        "max_prompt_tokens": config.data.max_prompt_tokens,
        "engine": config.rollout.engine,
        "dtype": config.policy.dtype,
        "attention": config.model.attention,
        "answer_timeout_s": config.reward.timeout_s,
    }


def facts_of_questions(questions: QuestionSet, prompts: Sequence[Prompt], first_prompt: str) -> dict[str, Any]:
    """Where a set comes from, checksums of its questions and of their prompts' tokens, and one prompt as text."""
    return {
        "source": questions.source,
        "num_questions": len(questions.questions),
        "left_out": left_out(questions, 0),
        "questions_sha256": questions.digest,
        "prompts_sha256": hashlib.sha256(repr([list(prompt.prompt_ids) for prompt in prompts]).encode()).hexdigest(),
        "first_prompt": first_prompt,
    }


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What two records of facts do not have in common, as "protocol.seed (0 -> 1)"."""
    old, new = dict(_flat(before)), dict(_flat(now))
    differing = [name for name in old | new if old.get(name) != new.get(name)]
    return [f"{name} ({_short(old.get(name))} -> {_short(new.get(name))})" for name in differing]


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}..."


def _flat(facts: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in facts.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def resume_replies(path: Path, n: int) -> dict[str, int]:
    """How many questions of each set have all n replies in a file of replies; what comes after them is cut off."""
    done: dict[str, int] = {}
    if not path.exists():
        return done
    position = end = 0
    with path.open("rb") as file:
        for line in file:
            position += len(line)
            try:
                row = json.loads(line)
            except ValueError:
                break
            if row["sample"] == n - 1 and line.endswith(b"\n"):
                done[row["set"]] = done.get(row["set"], 0) + 1
                end = position
    os.truncate(path, end)
    return done


def read_replies(path: Path, names: Sequence[str]) -> dict[str, list[dict[str, Any]]]:
    """The replies of each set, without the texts, which need not fit into memory."""
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    with path.open(encoding="utf-8") as file:
        for line in file:
            row = json.loads(line)
            del row["reply"], row["question"]
            found[row["set"]].append(row)
    return found
