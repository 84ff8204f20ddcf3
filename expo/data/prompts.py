"""Turns questions into prompts: the template of data.template or data.prompt, then the tokenizer's chat template."""

from collections.abc import Mapping, Sequence
from typing import Any

from expo.config import DataSection
from expo.config.templates import PROMPTS, parse_template, shorten_error
from expo.errors import ConfigError
from expo.rewards.extract import MARKS, READS
from expo.types import Prompt, Question, shown_options

__all__ = [
    "PROMPTS",
    "asks_for_answer",
    "prompt_warnings",
    "render_prompt",
    "render_prompts",
    "render_whole_set",
    "user_text",
]

NUM_SEARCHED = 20  # prompts of a set
ASKING = ("boxed", "answer", "think-answer")  # the names of templates that ask for a form of answer


class _Options(tuple[tuple[str, str], ...]):
    """Label and text of each choice; as text, a line for each."""

    __slots__ = ()

    def __str__(self) -> str:
        return shown_options(self)


def user_text(question: Question, config: DataSection) -> str:
    """The text of a question in its template, before the tokenizer's chat template.

    A context or options that the template does not use are part of its `question`.

    Raises: ConfigError, which names the question, if the template fails on it.
    """
    template = parse_template(config.prompt if config.template is None else config.template)
    if question.parts is None:
        values: dict[str, Any] = {"question": question.text, "context": "", "options": _Options()}
    else:
        parts = question.parts
        values = {
            "question": parts.text(without=template.variables),
            "context": parts.context,
            "options": _Options(parts.options),
        }
    try:
        return template.render(values)
    except Exception as error:  # a template is a program: it raises its own errors and those of its expressions
        raise ConfigError(
            f"data.template fails on question {question.id}: {shorten_error(error)}; correct the template"
        ) from error


def render_prompt(question: Question, config: DataSection, tokenizer: Any) -> list[int]:
    """Token ids of a question's prompt, up to the first token of the reply.

    Raises: ConfigError if data.chat_template is true and the tokenizer has no chat template or its template fails, or
        if the question has a system message that could not be shown; or as `user_text`.
    """
    text = user_text(question, config)
    system = question.system if config.system is None else config.system
    if not config.chat_template:
        if system:
            raise ConfigError(
                f"question {question.id} has a system message, which only a chat template can show; set "
                f"--data.chat_template=true, or leave it out: --data.system='\"\"'"
            )
        return _without_end(list(tokenizer(text)["input_ids"]), text, tokenizer)
    if not getattr(tokenizer, "chat_template", None):
        raise ConfigError(
            "data.chat_template is true, but the tokenizer has none; turn it off: --data.chat_template=false, or of "
            "python -m expo.data --no-chat-template"
        )
    messages = [{"role": "system", "content": system}] if system else []
    messages.append({"role": "user", "content": text})
    try:
        encoded = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_dict=True, **config.chat_template_kwargs
        )
    except Exception as error:  # a template is a program: it raises its own errors and those of its expressions
        raise ConfigError(
            f"the tokenizer's chat template fails on question {question.id}: {shorten_error(error)}; change "
            f"data.system or data.chat_template_kwargs, or set --data.chat_template=false"
        ) from error
    return list(encoded["input_ids"])


def _without_end(ids: list[int], text: str, tokenizer: Any) -> list[int]:
    """The ids without the special tokens that some tokenizers append: a reply cannot follow an end of sequence."""
    special = set(getattr(tokenizer, "all_special_ids", ()))
    while len(ids) > 1 and ids[-1] in special and not text.endswith(tokenizer.decode(ids[-1:])):
        ids.pop()
    return ids


def render_prompts(questions: Sequence[Question], config: DataSection, tokenizer: Any) -> list[Prompt]:
    """The questions whose prompts have at most data.max_prompt_tokens tokens, with these prompts.

    Raises: ConfigError if no prompt fits, or as `render_prompt`.
    """
    rendered = [Prompt(question, render_prompt(question, config, tokenizer)) for question in questions]
    fitting = [prompt for prompt in rendered if len(prompt.prompt_ids) <= config.max_prompt_tokens]
    if not fitting:
        shortest = min(len(prompt.prompt_ids) for prompt in rendered)
        raise ConfigError(
            f"no prompt fits data.max_prompt_tokens = {config.max_prompt_tokens}; the shortest has {shortest} tokens: "
            f"raise it"
        )
    return fitting


def render_whole_set(name: str, questions: Sequence[Question], config: DataSection, tokenizer: Any) -> list[Prompt]:
    """All questions of an evaluation set with their prompts; dropping some would change what its score means.

    Raises: ConfigError, which names the set, if a prompt exceeds data.max_prompt_tokens; or as `render_prompt`.
    """
    rendered = [Prompt(question, render_prompt(question, config, tokenizer)) for question in questions]
    lengths = [len(prompt.prompt_ids) for prompt in rendered]
    num_long = sum(length > config.max_prompt_tokens for length in lengths)
    if num_long:
        raise ConfigError(
            f"{name}: the prompts of {num_long} questions are longer than data.max_prompt_tokens = "
            f"{config.max_prompt_tokens}, and dropping them would change the set; raise it to {max(lengths)}"
        )
    return rendered


def asks_for_answer(text: str) -> bool:
    """Whether a prompt mentions a form of answer that the verifier reads."""
    return any(mark.casefold() in text.casefold() for mark in MARKS)


def prompt_warnings(
    prompts: Mapping[str, Sequence[Prompt]], config: DataSection, verifier: str, tokenizer: Any
) -> list[str]:
    """A warning for each set none of whose first chat prompts mentions a form of answer that the verifier reads.

    Args:
        prompts: by the name of their set.
        config: how they were made.
        verifier: the value of reward.verifier.
        tokenizer: of the prompts.
    """
    if ":" in verifier or not config.chat_template:  # what it reads is not known; a base model continues examples
        return []
    return [
        f"warning: no prompt of {name} asks for an answer that can be read; the verifier reads {READS}; set "
        f"data.prompt to {' or '.join(ASKING)}, or say it in data.template or data.system"
        for name, group in prompts.items()
        if not any(asks_for_answer(tokenizer.decode(prompt.prompt_ids)) for prompt in group[:NUM_SEARCHED])
    ]
