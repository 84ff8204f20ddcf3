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


PROTOCOL_FIELDS = {
    "num_samples": "evaluation.num_samples",
    "temperature": "evaluation.temperature",
    "top_p": "evaluation.top_p",
    "max_new_tokens": "rollout.max_new_tokens",
    "seed": "run.seed",
    "prompt": "data.prompt",
    "chat_template": "data.chat_template",
    "max_prompt_tokens": "data.max_prompt_tokens",
    "engine": "rollout.engine",
    "dtype": "policy.dtype",
    "attention": "model.attention",
    "verifier": "reward.verifier",
    "unevaluated": "reward.unevaluated",
    "think_tags": "reward.think_tags",
    "answer_timeout_s": "reward.timeout_s",
    "template": "data.template",
    "system": "data.system",
    "chat_template_kwargs": "data.chat_template_kwargs",
    "stop_tokens": "rollout.stop_tokens",
}
"""Every setting on which the scores depend, and the field that sets it."""
QUESTION_FIELDS = {"columns": "data.columns", "skip_bad_answers": "data.skip_bad_answers"}
"""How the questions were read, in the metadata of a set, and the field that sets it."""
NONE_IF_NOT_SET = ("template", "system", "chat_template_kwargs", "stop_tokens", *QUESTION_FIELDS)
"""So that an evaluation that was started before these settings were recorded can be resumed."""


def evaluation_protocol(config: EvalConfig) -> dict[str, Any]:
    """The values of `PROTOCOL_FIELDS`."""
    return _recorded(config, PROTOCOL_FIELDS)


def _recorded(config: EvalConfig, fields: Mapping[str, str]) -> dict[str, Any]:
    values = {}
    for name, field in fields.items():
        section, in_section = field.split(".")
        value = getattr(getattr(config, section), in_section)
        values[name] = value or None if name in NONE_IF_NOT_SET else value
    return values


def question_metadata(
    questions: QuestionSet, prompts: Sequence[Prompt], first_prompt: str, config: EvalConfig
) -> dict[str, Any]:
    """The source of a set and how it was read, checksums of its questions and of their prompts' token ids, and one
    prompt as text.
    """
    return {
        "source": questions.source,
        **_recorded(config, QUESTION_FIELDS),
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
