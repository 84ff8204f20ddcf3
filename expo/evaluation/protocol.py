"""The metadata of an evaluation (model, protocol, questions, software), by which two evaluations are compared."""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from expo.config import EvalConfig
from expo.data import QuestionSet
from expo.data.record import left_out
from expo.types import Prompt

PROTOCOL = "protocol.json"  # the metadata, written before the first reply
RESULTS = "results.json"  # the metadata and the scores
MAX_SHOWN = 40  # characters of a value in a message; prompts and checksums are longer


def evaluation_protocol(config: EvalConfig) -> dict[str, Any]:
    """Every setting on which the scores depend."""
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
        "verifier": config.reward.verifier,
        "unevaluated": config.reward.unevaluated,
        "think_tags": config.reward.think_tags,
        "answer_timeout_s": config.reward.timeout_s,
    }


def question_metadata(questions: QuestionSet, prompts: Sequence[Prompt], first_prompt: str) -> dict[str, Any]:
    """The source of a set, checksums of its questions and of their prompts' token ids, and one prompt as text."""
    return {
        "source": questions.source,
        "num_questions": len(questions.questions),
        "left_out": left_out(questions, 0),
        "questions_sha256": questions.digest,
        "prompts_sha256": hashlib.sha256(repr([list(prompt.prompt_ids) for prompt in prompts]).encode()).hexdigest(),
        "first_prompt": first_prompt,
    }


def differences(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """The values in which two metadata differ, each as "protocol.seed (0 -> 1)"."""
    old, new = dict(_flatten(before)), dict(_flatten(after))
    names = [name for name in old | new if old.get(name) != new.get(name)]
    return [f"{name} ({_shorten(old.get(name))} -> {_shorten(new.get(name))})" for name in names]


def _shorten(value: Any) -> str:
    text = str(value)
    return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}..."


def _flatten(metadata: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in metadata.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
